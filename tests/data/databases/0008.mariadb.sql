CREATE TABLE `aggregates` (
  `run_id` int(11) NOT NULL,
  `concurrency` double NOT NULL,
  `prompt_tokens` double NOT NULL,
  `output_tokens` double NOT NULL,
  `ttft_s` double NOT NULL,
  `tpot_s` double NOT NULL,
  PRIMARY KEY (`run_id`),
  CONSTRAINT `aggregates_ibfk_1` FOREIGN KEY (`run_id`) REFERENCES `runs` (`id`) ON DELETE CASCADE
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `aggregates` VALUES (1,0.1,0.1,0.1,0.1,0.1);
INSERT INTO `aggregates` VALUES (2,1.1,1.1,1.1,1.1,1.1);
INSERT INTO `aggregates` VALUES (3,2.1,2.1,2.1,2.1,2.1);
CREATE TABLE `alembic_version` (
  `version_num` varchar(32) NOT NULL,
  PRIMARY KEY (`version_num`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `alembic_version` VALUES ('0008');
CREATE TABLE `decisions` (
  `id` int(11) NOT NULL AUTO_INCREMENT,
  `run_id` int(11) DEFAULT NULL,
  `control` varchar(400) NOT NULL,
  `unix_s` double NOT NULL,
  `at_s` double NOT NULL,
  `until_s` double NOT NULL,
  `action` varchar(20) NOT NULL,
  `fleet_before` varchar(40) DEFAULT NULL,
  `fleet_after` varchar(40) DEFAULT NULL,
  `reason` text NOT NULL,
  `repeats` int(11) NOT NULL,
  PRIMARY KEY (`id`),
  KEY `ix_decisions_run_id` (`run_id`),
  KEY `ix_decisions_unix_s` (`unix_s`),
  CONSTRAINT `decisions_ibfk_1` FOREIGN KEY (`run_id`) REFERENCES `runs` (`id`) ON DELETE CASCADE
) ENGINE=InnoDB AUTO_INCREMENT=4 DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `decisions` VALUES (1,1,'control 0 \'é\"',0.1,0.1,0.1,'action 0 \'é\"','fleet_before 0 \'é\"','fleet_after 0 \'é\"','reason 0 \'é\"',1);
INSERT INTO `decisions` VALUES (2,2,'control 1 \'é\"',1.1,1.1,1.1,'action 1 \'é\"','fleet_before 1 \'é\"','fleet_after 1 \'é\"','reason 1 \'é\"',2);
INSERT INTO `decisions` VALUES (3,3,'control 2 \'é\"',2.1,2.1,2.1,'action 2 \'é\"','fleet_before 2 \'é\"','fleet_after 2 \'é\"','reason 2 \'é\"',3);
CREATE TABLE `fleet_changes` (
  `id` int(11) NOT NULL AUTO_INCREMENT,
  `run_id` int(11) DEFAULT NULL,
  `asked_s` double NOT NULL,
  `ready_s` double DEFAULT NULL,
  `before_prefill` int(11) NOT NULL,
  `before_decode` int(11) NOT NULL,
  `after_prefill` int(11) NOT NULL,
  `after_decode` int(11) NOT NULL,
  `reason` text NOT NULL,
  `before_mixed` int(11) NOT NULL DEFAULT 0,
  `after_mixed` int(11) NOT NULL DEFAULT 0,
  `control` varchar(400) NOT NULL DEFAULT '',
  `asked_unix_s` double DEFAULT NULL,
  `joined_s` double DEFAULT NULL,
  `first_served_s` double DEFAULT NULL,
  `in_flight` int(11) DEFAULT NULL,
  `failed` int(11) DEFAULT NULL,
  `slowed` int(11) DEFAULT NULL,
  PRIMARY KEY (`id`),
  UNIQUE KEY `uq_fleet_changes` (`run_id`,`asked_s`),
  CONSTRAINT `fleet_changes_ibfk_1` FOREIGN KEY (`run_id`) REFERENCES `runs` (`id`) ON DELETE CASCADE
) ENGINE=InnoDB AUTO_INCREMENT=4 DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `fleet_changes` VALUES (1,1,0.1,0.1,1,1,1,1,'reason 0 \'é\"',1,1,'control 0 \'é\"',0.1,0.1,0.1,1,1,1);
INSERT INTO `fleet_changes` VALUES (2,2,1.1,1.1,2,2,2,2,'reason 1 \'é\"',2,2,'control 1 \'é\"',1.1,1.1,1.1,2,2,2);
INSERT INTO `fleet_changes` VALUES (3,3,2.1,2.1,3,3,3,3,'reason 2 \'é\"',3,3,'control 2 \'é\"',2.1,2.1,2.1,3,3,3);
CREATE TABLE `histograms` (
  `id` int(11) NOT NULL AUTO_INCREMENT,
  `run_id` int(11) NOT NULL,
  `worker` text NOT NULL,
  `role` varchar(10) NOT NULL,
  `name` varchar(40) NOT NULL,
  `source` text NOT NULL,
  `count` double NOT NULL,
  `total` double NOT NULL,
  `buckets` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL CHECK (json_valid(`buckets`)),
  PRIMARY KEY (`id`),
  KEY `ix_histograms_run_id` (`run_id`),
  CONSTRAINT `histograms_ibfk_1` FOREIGN KEY (`run_id`) REFERENCES `runs` (`id`) ON DELETE CASCADE
) ENGINE=InnoDB AUTO_INCREMENT=4 DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `histograms` VALUES (1,1,'worker 0 \'é\"','decode','name 0 \'é\"','source 0 \'é\"',0.1,0.1,'[[0.5, 1.0], [null, 2.0]]');
INSERT INTO `histograms` VALUES (2,2,'worker 1 \'é\"','decode','name 1 \'é\"','source 1 \'é\"',1.1,1.1,'[[0.5, 1.0], [null, 2.0]]');
INSERT INTO `histograms` VALUES (3,3,'worker 2 \'é\"','decode','name 2 \'é\"','source 2 \'é\"',2.1,2.1,'[[0.5, 1.0], [null, 2.0]]');
CREATE TABLE `observations` (
  `run_id` int(11) NOT NULL,
  `index` bigint(20) NOT NULL,
  `worker` smallint(6) DEFAULT NULL,
  `due_s` double DEFAULT NULL,
  `sent_s` double DEFAULT NULL,
  `first_byte_s` double DEFAULT NULL,
  `first_token_s` double DEFAULT NULL,
  `last_token_s` double DEFAULT NULL,
  `requested_prompt_tokens` int(11) DEFAULT NULL,
  `requested_tokens` int(11) DEFAULT NULL,
  `prompt_tokens` int(11) DEFAULT NULL,
  `output_tokens` int(11) DEFAULT NULL,
  `chunks` int(11) DEFAULT NULL,
  `max_gap_s` double DEFAULT NULL,
  `http_status` smallint(6) DEFAULT NULL,
  `status` varchar(9) NOT NULL,
  `error` varchar(16) NOT NULL,
  `detail` text NOT NULL,
  `dispatch_s` double DEFAULT NULL,
  `prefill_worker` text DEFAULT NULL,
  `decode_worker` text DEFAULT NULL,
  `queue_s` double DEFAULT NULL,
  `prefill_s` double DEFAULT NULL,
  `transfer_s` double DEFAULT NULL,
  `first_step_s` double DEFAULT NULL,
  `cached_tokens` int(11) DEFAULT NULL,
  `facts` text DEFAULT NULL,
  PRIMARY KEY (`run_id`,`index`),
  CONSTRAINT `observations_ibfk_1` FOREIGN KEY (`run_id`) REFERENCES `runs` (`id`) ON DELETE CASCADE
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `observations` VALUES (1,1,1,0.1,0.1,0.1,0.1,0.1,1,1,1,1,1,0.1,1,'ok','','detail 0 \'é\"',0.1,'prefill_worker 0 \'é\"','decode_worker 0 \'é\"',0.1,0.1,0.1,0.1,1,'facts 0 \'é\"');
INSERT INTO `observations` VALUES (2,2,2,1.1,1.1,1.1,1.1,1.1,2,2,2,2,2,1.1,2,'ok','','detail 1 \'é\"',1.1,'prefill_worker 1 \'é\"','decode_worker 1 \'é\"',1.1,1.1,1.1,1.1,2,'facts 1 \'é\"');
INSERT INTO `observations` VALUES (3,3,3,2.1,2.1,2.1,2.1,2.1,3,3,3,3,3,2.1,3,'ok','','detail 2 \'é\"',2.1,'prefill_worker 2 \'é\"','decode_worker 2 \'é\"',2.1,2.1,2.1,2.1,3,'facts 2 \'é\"');
CREATE TABLE `recommendation_runs` (
  `recommendation_id` int(11) NOT NULL,
  `run_id` int(11) NOT NULL,
  PRIMARY KEY (`recommendation_id`,`run_id`),
  KEY `run_id` (`run_id`),
  CONSTRAINT `recommendation_runs_ibfk_1` FOREIGN KEY (`recommendation_id`) REFERENCES `recommendations` (`id`) ON DELETE CASCADE,
  CONSTRAINT `recommendation_runs_ibfk_2` FOREIGN KEY (`run_id`) REFERENCES `runs` (`id`) ON DELETE CASCADE
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `recommendation_runs` VALUES (1,1);
INSERT INTO `recommendation_runs` VALUES (2,2);
INSERT INTO `recommendation_runs` VALUES (3,3);
CREATE TABLE `recommendations` (
  `id` int(11) NOT NULL AUTO_INCREMENT,
  `created_at` varchar(40) NOT NULL,
  `kind` varchar(40) NOT NULL,
  `answer` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL CHECK (json_valid(`answer`)),
  `data_hash` varchar(64) NOT NULL,
  `version` varchar(40) NOT NULL,
  `seed` bigint(20) NOT NULL,
  `key` varchar(32) DEFAULT NULL,
  PRIMARY KEY (`id`),
  UNIQUE KEY `uq_recommendations` (`key`)
) ENGINE=InnoDB AUTO_INCREMENT=4 DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `recommendations` VALUES (1,'2026-01-02T03:04:05+00:00','kind 0 \'é\"','{\"ok\": 12, \"rows_kept\": 3}','data_hash 0 \'é\"','version 0 \'é\"',1,'key 0 \'é\"');
INSERT INTO `recommendations` VALUES (2,'2026-01-02T03:04:05+00:00','kind 1 \'é\"','{\"ok\": 12, \"rows_kept\": 3}','data_hash 1 \'é\"','version 1 \'é\"',2,'key 1 \'é\"');
INSERT INTO `recommendations` VALUES (3,'2026-01-02T03:04:05+00:00','kind 2 \'é\"','{\"ok\": 12, \"rows_kept\": 3}','data_hash 2 \'é\"','version 2 \'é\"',3,'key 2 \'é\"');
CREATE TABLE `runs` (
  `id` int(11) NOT NULL AUTO_INCREMENT,
  `key` varchar(32) NOT NULL,
  `name` text NOT NULL,
  `group` varchar(200) NOT NULL,
  `trace` varchar(200) NOT NULL,
  `schedule_digest` varchar(64) NOT NULL,
  `scheduled` int(11) NOT NULL,
  `endpoint` text NOT NULL,
  `engine` varchar(40) NOT NULL,
  `model` text NOT NULL,
  `profile` text NOT NULL,
  `prefill` int(11) DEFAULT NULL,
  `decode` int(11) DEFAULT NULL,
  `prefill_gpus` int(11) NOT NULL,
  `decode_gpus` int(11) NOT NULL,
  `started_unix_s` double NOT NULL,
  `workers` int(11) NOT NULL,
  `rate_factor` double NOT NULL,
  `rate_per_s` double DEFAULT NULL,
  `changes` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL CHECK (json_valid(`changes`)),
  `policy` varchar(40) NOT NULL,
  `seed` bigint(20) NOT NULL,
  `slo` text NOT NULL,
  `version` varchar(40) NOT NULL,
  `ended` tinyint(1) NOT NULL,
  `complete` tinyint(1) NOT NULL,
  `verdict` varchar(10) NOT NULL,
  `reason` text NOT NULL,
  `lag_p50_ms` double DEFAULT NULL,
  `lag_p99_ms` double DEFAULT NULL,
  `lag_max_ms` double DEFAULT NULL,
  `counts` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL CHECK (json_valid(`counts`)),
  `mixed` int(11) NOT NULL DEFAULT 0,
  `warmup_s` double NOT NULL DEFAULT 0,
  `costs` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT '{}' CHECK (json_valid(`costs`)),
  `sources` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT '{}' CHECK (json_valid(`sources`)),
  `engine_version` varchar(80) NOT NULL DEFAULT '',
  PRIMARY KEY (`id`),
  UNIQUE KEY `key` (`key`),
  KEY `ix_runs_group` (`group`)
) ENGINE=InnoDB AUTO_INCREMENT=4 DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `runs` VALUES (1,'key 0 \'é\"','name 0 \'é\"','group 0 \'é\"','trace 0 \'é\"','schedule_digest 0 \'é\"',1,'endpoint 0 \'é\"','engine 0 \'é\"','model 0 \'é\"','profile 0 \'é\"',1,1,1,1,0.1,1,0.1,0.1,'[\"rate x2\"]','static',1,'ttft<0.5s','version 0 \'é\"',1,1,'valid','reason 0 \'é\"',0.1,0.1,0.1,'{\"ok\": 12, \"rows_kept\": 3}',1,0.1,'{\"ok\": 12, \"rows_kept\": 3}','{\"ok\": 12, \"rows_kept\": 3}','engine_version 0 \'é\"');
INSERT INTO `runs` VALUES (2,'key 1 \'é\"','name 1 \'é\"','group 1 \'é\"','trace 1 \'é\"','schedule_digest 1 \'é\"',2,'endpoint 1 \'é\"','engine 1 \'é\"','model 1 \'é\"','profile 1 \'é\"',2,2,2,2,1.1,2,1.1,1.1,'[\"rate x2\"]','static',2,'ttft<0.5s','version 1 \'é\"',1,1,'valid','reason 1 \'é\"',1.1,1.1,1.1,'{\"ok\": 12, \"rows_kept\": 3}',2,1.1,'{\"ok\": 12, \"rows_kept\": 3}','{\"ok\": 12, \"rows_kept\": 3}','engine_version 1 \'é\"');
INSERT INTO `runs` VALUES (3,'key 2 \'é\"','name 2 \'é\"','group 2 \'é\"','trace 2 \'é\"','schedule_digest 2 \'é\"',3,'endpoint 2 \'é\"','engine 2 \'é\"','model 2 \'é\"','profile 2 \'é\"',3,3,3,3,2.1,3,2.1,2.1,'[\"rate x2\"]','static',3,'ttft<0.5s','version 2 \'é\"',1,1,'valid','reason 2 \'é\"',2.1,2.1,2.1,'{\"ok\": 12, \"rows_kept\": 3}',3,2.1,'{\"ok\": 12, \"rows_kept\": 3}','{\"ok\": 12, \"rows_kept\": 3}','engine_version 2 \'é\"');
CREATE TABLE `samples` (
  `id` bigint(20) NOT NULL AUTO_INCREMENT,
  `run_id` int(11) NOT NULL,
  `at_s` double NOT NULL,
  `worker` text NOT NULL,
  `role` varchar(10) NOT NULL,
  `waiting_requests` double DEFAULT NULL,
  `running_requests` double DEFAULT NULL,
  `waiting_tokens` double DEFAULT NULL,
  `kv_used_tokens` double DEFAULT NULL,
  `kv_used_ratio` double DEFAULT NULL,
  `busy_s_total` double DEFAULT NULL,
  `steps_total` double DEFAULT NULL,
  `prompt_tokens_total` double DEFAULT NULL,
  `output_tokens_total` double DEFAULT NULL,
  `finished_total` double DEFAULT NULL,
  `preemptions_total` double DEFAULT NULL,
  `transfer_s_total` double DEFAULT NULL,
  `inflight_requests` double DEFAULT NULL,
  `paused_requests` double DEFAULT NULL,
  `transferring_requests` double DEFAULT NULL,
  `transfer_s` double DEFAULT NULL,
  `transfers_total` double DEFAULT NULL,
  `transfer_bytes_total` double DEFAULT NULL,
  `failed_transfers_total` double DEFAULT NULL,
  `received_tokens_total` double DEFAULT NULL,
  `lookup_tokens_total` double DEFAULT NULL,
  `cached_tokens_total` double DEFAULT NULL,
  `cache_hit_ratio` double DEFAULT NULL,
  `gpu_busy_ratio` double DEFAULT NULL,
  PRIMARY KEY (`id`),
  UNIQUE KEY `uq_samples` (`run_id`,`at_s`,`worker`(200),`role`),
  CONSTRAINT `samples_ibfk_1` FOREIGN KEY (`run_id`) REFERENCES `runs` (`id`) ON DELETE CASCADE
) ENGINE=InnoDB AUTO_INCREMENT=4 DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `samples` VALUES (1,1,0.1,'worker 0 \'é\"','decode',0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1);
INSERT INTO `samples` VALUES (2,2,1.1,'worker 1 \'é\"','decode',1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1);
INSERT INTO `samples` VALUES (3,3,2.1,'worker 2 \'é\"','decode',2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1);
CREATE TABLE `summaries` (
  `run_id` int(11) NOT NULL,
  `figures` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL CHECK (json_valid(`figures`)),
  `bins` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL CHECK (json_valid(`bins`)),
  `latencies` longblob DEFAULT NULL,
  PRIMARY KEY (`run_id`),
  CONSTRAINT `summaries_ibfk_1` FOREIGN KEY (`run_id`) REFERENCES `runs` (`id`) ON DELETE CASCADE
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `summaries` VALUES (1,'{\"ok\": 12, \"rows_kept\": 3}','{\"ok\": 12, \"rows_kept\": 3}','\0');
INSERT INTO `summaries` VALUES (2,'{\"ok\": 12, \"rows_kept\": 3}','{\"ok\": 12, \"rows_kept\": 3}','\0');
INSERT INTO `summaries` VALUES (3,'{\"ok\": 12, \"rows_kept\": 3}','{\"ok\": 12, \"rows_kept\": 3}','\0');
CREATE TABLE `trace_sources` (
  `id` int(11) NOT NULL AUTO_INCREMENT,
  `name` varchar(200) NOT NULL,
  `format` varchar(40) NOT NULL,
  `sha256` varchar(64) NOT NULL,
  `files` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL CHECK (json_valid(`files`)),
  `options` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL CHECK (json_valid(`options`)),
  `summary` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL CHECK (json_valid(`summary`)),
  `origin_utc` varchar(40) DEFAULT NULL,
  `block_size` int(11) DEFAULT NULL,
  `hash_scope` varchar(20) DEFAULT NULL,
  `tool_version` varchar(40) NOT NULL,
  `created_at` varchar(40) NOT NULL,
  PRIMARY KEY (`id`),
  UNIQUE KEY `name` (`name`)
) ENGINE=InnoDB AUTO_INCREMENT=4 DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `trace_sources` VALUES (1,'name 0 \'é\"','format 0 \'é\"','sha256 0 \'é\"','[]','{\"ok\": 12, \"rows_kept\": 3}','{\"ok\": 12, \"rows_kept\": 3}','2023-11-16T18:15:46+00:00',1,'trace','tool_version 0 \'é\"','2026-01-02T03:04:05+00:00');
INSERT INTO `trace_sources` VALUES (2,'name 1 \'é\"','format 1 \'é\"','sha256 1 \'é\"','[]','{\"ok\": 12, \"rows_kept\": 3}','{\"ok\": 12, \"rows_kept\": 3}','2023-11-16T18:15:46+00:00',2,'trace','tool_version 1 \'é\"','2026-01-02T03:04:05+00:00');
INSERT INTO `trace_sources` VALUES (3,'name 2 \'é\"','format 2 \'é\"','sha256 2 \'é\"','[]','{\"ok\": 12, \"rows_kept\": 3}','{\"ok\": 12, \"rows_kept\": 3}','2023-11-16T18:15:46+00:00',3,'trace','tool_version 2 \'é\"','2026-01-02T03:04:05+00:00');
CREATE TABLE `traces` (
  `source_id` int(11) NOT NULL,
  `seq` int(11) NOT NULL,
  `source_line` int(11) NOT NULL,
  `arrival_us` bigint(20) NOT NULL,
  `prompt_tokens` int(11) NOT NULL,
  `output_tokens` int(11) DEFAULT NULL,
  `status` smallint(6) NOT NULL,
  `session_key` text DEFAULT NULL,
  `hash_ids` longblob DEFAULT NULL,
  `turn` int(11) DEFAULT NULL,
  `parent_seq` int(11) DEFAULT NULL,
  `think_us` bigint(20) DEFAULT NULL,
  `source_ttft_us` bigint(20) DEFAULT NULL,
  `source_e2e_us` bigint(20) DEFAULT NULL,
  PRIMARY KEY (`source_id`,`seq`),
  CONSTRAINT `traces_ibfk_1` FOREIGN KEY (`source_id`) REFERENCES `trace_sources` (`id`) ON DELETE CASCADE
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin;
INSERT INTO `traces` VALUES (1,1,1,1,1,1,0,'session_key 0 \'é\"','\0',1,0,1,1,1);
INSERT INTO `traces` VALUES (2,2,2,2,2,2,0,'session_key 1 \'é\"','\0',2,1,2,2,2);
INSERT INTO `traces` VALUES (3,3,3,3,3,3,0,'session_key 2 \'é\"','\0',3,2,3,3,3);
