BEGIN TRANSACTION;
CREATE TABLE aggregates (
	run_id INTEGER NOT NULL, 
	concurrency DOUBLE NOT NULL, 
	prompt_tokens DOUBLE NOT NULL, 
	output_tokens DOUBLE NOT NULL, 
	ttft_s DOUBLE NOT NULL, 
	tpot_s DOUBLE NOT NULL, 
	PRIMARY KEY (run_id), 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "aggregates" VALUES(1,0.1,0.1,0.1,0.1,0.1);
INSERT INTO "aggregates" VALUES(2,1.1,1.1,1.1,1.1,1.1);
INSERT INTO "aggregates" VALUES(3,2.1,2.1,2.1,2.1,2.1);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0008');
CREATE TABLE decisions (
	id INTEGER NOT NULL, 
	run_id INTEGER, 
	control VARCHAR(400) NOT NULL, 
	unix_s DOUBLE NOT NULL, 
	at_s DOUBLE NOT NULL, 
	until_s DOUBLE NOT NULL, 
	action VARCHAR(20) NOT NULL, 
	fleet_before VARCHAR(40), 
	fleet_after VARCHAR(40), 
	reason TEXT NOT NULL, 
	repeats INTEGER NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "decisions" VALUES(1,1,'control 0 ''é"',0.1,0.1,0.1,'action 0 ''é"','fleet_before 0 ''é"','fleet_after 0 ''é"','reason 0 ''é"',1);
INSERT INTO "decisions" VALUES(2,2,'control 1 ''é"',1.1,1.1,1.1,'action 1 ''é"','fleet_before 1 ''é"','fleet_after 1 ''é"','reason 1 ''é"',2);
INSERT INTO "decisions" VALUES(3,3,'control 2 ''é"',2.1,2.1,2.1,'action 2 ''é"','fleet_before 2 ''é"','fleet_after 2 ''é"','reason 2 ''é"',3);
CREATE TABLE "fleet_changes" (
	id INTEGER NOT NULL, 
	run_id INTEGER, 
	asked_s DOUBLE NOT NULL, 
	ready_s DOUBLE, 
	before_prefill INTEGER NOT NULL, 
	before_decode INTEGER NOT NULL, 
	after_prefill INTEGER NOT NULL, 
	after_decode INTEGER NOT NULL, 
	reason TEXT NOT NULL, 
	before_mixed INTEGER DEFAULT '0' NOT NULL, 
	after_mixed INTEGER DEFAULT '0' NOT NULL, 
	control VARCHAR(400) DEFAULT '' NOT NULL, 
	asked_unix_s DOUBLE, 
	joined_s DOUBLE, 
	first_served_s DOUBLE, 
	in_flight INTEGER, 
	failed INTEGER, 
	slowed INTEGER, 
	PRIMARY KEY (id), 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "fleet_changes" VALUES(1,1,0.1,0.1,1,1,1,1,'reason 0 ''é"',1,1,'control 0 ''é"',0.1,0.1,0.1,1,1,1);
INSERT INTO "fleet_changes" VALUES(2,2,1.1,1.1,2,2,2,2,'reason 1 ''é"',2,2,'control 1 ''é"',1.1,1.1,1.1,2,2,2);
INSERT INTO "fleet_changes" VALUES(3,3,2.1,2.1,3,3,3,3,'reason 2 ''é"',3,3,'control 2 ''é"',2.1,2.1,2.1,3,3,3);
CREATE TABLE histograms (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	worker TEXT NOT NULL, 
	role VARCHAR(10) NOT NULL, 
	name VARCHAR(40) NOT NULL, 
	source TEXT NOT NULL, 
	count DOUBLE NOT NULL, 
	total DOUBLE NOT NULL, 
	buckets JSON NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "histograms" VALUES(1,1,'worker 0 ''é"','decode','name 0 ''é"','source 0 ''é"',0.1,0.1,'[[0.5, 1.0], [null, 2.0]]');
INSERT INTO "histograms" VALUES(2,2,'worker 1 ''é"','decode','name 1 ''é"','source 1 ''é"',1.1,1.1,'[[0.5, 1.0], [null, 2.0]]');
INSERT INTO "histograms" VALUES(3,3,'worker 2 ''é"','decode','name 2 ''é"','source 2 ''é"',2.1,2.1,'[[0.5, 1.0], [null, 2.0]]');
CREATE TABLE observations (
	run_id INTEGER NOT NULL, 
	"index" BIGINT NOT NULL, 
	worker SMALLINT, 
	due_s DOUBLE, 
	sent_s DOUBLE, 
	first_byte_s DOUBLE, 
	first_token_s DOUBLE, 
	last_token_s DOUBLE, 
	requested_prompt_tokens INTEGER, 
	requested_tokens INTEGER, 
	prompt_tokens INTEGER, 
	output_tokens INTEGER, 
	chunks INTEGER, 
	max_gap_s DOUBLE, 
	http_status SMALLINT, 
	status VARCHAR(9) NOT NULL, 
	error VARCHAR(16) NOT NULL, 
	detail TEXT NOT NULL, dispatch_s DOUBLE, prefill_worker TEXT, decode_worker TEXT, queue_s DOUBLE, prefill_s DOUBLE, transfer_s DOUBLE, first_step_s DOUBLE, cached_tokens INTEGER, facts TEXT, 
	PRIMARY KEY (run_id, "index"), 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "observations" VALUES(1,1,1,0.1,0.1,0.1,0.1,0.1,1,1,1,1,1,0.1,1,'ok','','detail 0 ''é"',0.1,'prefill_worker 0 ''é"','decode_worker 0 ''é"',0.1,0.1,0.1,0.1,1,'facts 0 ''é"');
INSERT INTO "observations" VALUES(2,2,2,1.1,1.1,1.1,1.1,1.1,2,2,2,2,2,1.1,2,'ok','','detail 1 ''é"',1.1,'prefill_worker 1 ''é"','decode_worker 1 ''é"',1.1,1.1,1.1,1.1,2,'facts 1 ''é"');
INSERT INTO "observations" VALUES(3,3,3,2.1,2.1,2.1,2.1,2.1,3,3,3,3,3,2.1,3,'ok','','detail 2 ''é"',2.1,'prefill_worker 2 ''é"','decode_worker 2 ''é"',2.1,2.1,2.1,2.1,3,'facts 2 ''é"');
CREATE TABLE recommendation_runs (
	recommendation_id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	PRIMARY KEY (recommendation_id, run_id), 
	FOREIGN KEY(recommendation_id) REFERENCES recommendations (id) ON DELETE CASCADE, 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "recommendation_runs" VALUES(1,1);
INSERT INTO "recommendation_runs" VALUES(2,2);
INSERT INTO "recommendation_runs" VALUES(3,3);
CREATE TABLE recommendations (
	id INTEGER NOT NULL, 
	created_at VARCHAR(40) NOT NULL, 
	kind VARCHAR(40) NOT NULL, 
	answer JSON NOT NULL, 
	data_hash VARCHAR(64) NOT NULL, 
	version VARCHAR(40) NOT NULL, 
	seed BIGINT NOT NULL, "key" VARCHAR(32), 
	PRIMARY KEY (id)
);
INSERT INTO "recommendations" VALUES(1,'2026-01-02T03:04:05+00:00','kind 0 ''é"','{"ok": 12, "rows_kept": 3}','data_hash 0 ''é"','version 0 ''é"',1,'key 0 ''é"');
INSERT INTO "recommendations" VALUES(2,'2026-01-02T03:04:05+00:00','kind 1 ''é"','{"ok": 12, "rows_kept": 3}','data_hash 1 ''é"','version 1 ''é"',2,'key 1 ''é"');
INSERT INTO "recommendations" VALUES(3,'2026-01-02T03:04:05+00:00','kind 2 ''é"','{"ok": 12, "rows_kept": 3}','data_hash 2 ''é"','version 2 ''é"',3,'key 2 ''é"');
CREATE TABLE runs (
	id INTEGER NOT NULL, 
	"key" VARCHAR(32) NOT NULL, 
	name TEXT NOT NULL, 
	"group" VARCHAR(200) NOT NULL, 
	trace VARCHAR(200) NOT NULL, 
	schedule_digest VARCHAR(64) NOT NULL, 
	scheduled INTEGER NOT NULL, 
	endpoint TEXT NOT NULL, 
	engine VARCHAR(40) NOT NULL, 
	model TEXT NOT NULL, 
	profile TEXT NOT NULL, 
	prefill INTEGER, 
	decode INTEGER, 
	prefill_gpus INTEGER NOT NULL, 
	decode_gpus INTEGER NOT NULL, 
	started_unix_s DOUBLE NOT NULL, 
	workers INTEGER NOT NULL, 
	rate_factor DOUBLE NOT NULL, 
	rate_per_s DOUBLE, 
	changes JSON NOT NULL, 
	policy VARCHAR(40) NOT NULL, 
	seed BIGINT NOT NULL, 
	slo TEXT NOT NULL, 
	version VARCHAR(40) NOT NULL, 
	ended BOOLEAN NOT NULL, 
	complete BOOLEAN NOT NULL, 
	verdict VARCHAR(10) NOT NULL, 
	reason TEXT NOT NULL, 
	lag_p50_ms DOUBLE, 
	lag_p99_ms DOUBLE, 
	lag_max_ms DOUBLE, 
	counts JSON NOT NULL, mixed INTEGER DEFAULT '0' NOT NULL, warmup_s DOUBLE DEFAULT '0' NOT NULL, costs JSON DEFAULT '{}' NOT NULL, sources JSON DEFAULT '{}' NOT NULL, engine_version VARCHAR(80) DEFAULT '' NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE ("key")
);
INSERT INTO "runs" VALUES(1,'key 0 ''é"','name 0 ''é"','group 0 ''é"','trace 0 ''é"','schedule_digest 0 ''é"',1,'endpoint 0 ''é"','engine 0 ''é"','model 0 ''é"','profile 0 ''é"',1,1,1,1,0.1,1,0.1,0.1,'["rate x2"]','static',1,'ttft<0.5s','version 0 ''é"',1,1,'valid','reason 0 ''é"',0.1,0.1,0.1,'{"ok": 12, "rows_kept": 3}',1,0.1,'{"ok": 12, "rows_kept": 3}','{"ok": 12, "rows_kept": 3}','engine_version 0 ''é"');
INSERT INTO "runs" VALUES(2,'key 1 ''é"','name 1 ''é"','group 1 ''é"','trace 1 ''é"','schedule_digest 1 ''é"',2,'endpoint 1 ''é"','engine 1 ''é"','model 1 ''é"','profile 1 ''é"',2,2,2,2,1.1,2,1.1,1.1,'["rate x2"]','static',2,'ttft<0.5s','version 1 ''é"',1,1,'valid','reason 1 ''é"',1.1,1.1,1.1,'{"ok": 12, "rows_kept": 3}',2,1.1,'{"ok": 12, "rows_kept": 3}','{"ok": 12, "rows_kept": 3}','engine_version 1 ''é"');
INSERT INTO "runs" VALUES(3,'key 2 ''é"','name 2 ''é"','group 2 ''é"','trace 2 ''é"','schedule_digest 2 ''é"',3,'endpoint 2 ''é"','engine 2 ''é"','model 2 ''é"','profile 2 ''é"',3,3,3,3,2.1,3,2.1,2.1,'["rate x2"]','static',3,'ttft<0.5s','version 2 ''é"',1,1,'valid','reason 2 ''é"',2.1,2.1,2.1,'{"ok": 12, "rows_kept": 3}',3,2.1,'{"ok": 12, "rows_kept": 3}','{"ok": 12, "rows_kept": 3}','engine_version 2 ''é"');
CREATE TABLE samples (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	at_s DOUBLE NOT NULL, 
	worker TEXT NOT NULL, 
	role VARCHAR(10) NOT NULL, 
	waiting_requests DOUBLE, 
	running_requests DOUBLE, 
	waiting_tokens DOUBLE, 
	kv_used_tokens DOUBLE, 
	kv_used_ratio DOUBLE, 
	busy_s_total DOUBLE, 
	steps_total DOUBLE, 
	prompt_tokens_total DOUBLE, 
	output_tokens_total DOUBLE, 
	finished_total DOUBLE, 
	preemptions_total DOUBLE, 
	transfer_s_total DOUBLE, inflight_requests DOUBLE, paused_requests DOUBLE, transferring_requests DOUBLE, transfer_s DOUBLE, transfers_total DOUBLE, transfer_bytes_total DOUBLE, failed_transfers_total DOUBLE, received_tokens_total DOUBLE, lookup_tokens_total DOUBLE, cached_tokens_total DOUBLE, cache_hit_ratio DOUBLE, gpu_busy_ratio DOUBLE, 
	PRIMARY KEY (id), 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "samples" VALUES(1,1,0.1,'worker 0 ''é"','decode',0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1);
INSERT INTO "samples" VALUES(2,2,1.1,'worker 1 ''é"','decode',1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1,1.1);
INSERT INTO "samples" VALUES(3,3,2.1,'worker 2 ''é"','decode',2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1,2.1);
CREATE TABLE summaries (
	run_id INTEGER NOT NULL, 
	figures JSON NOT NULL, 
	bins JSON NOT NULL, latencies BLOB, 
	PRIMARY KEY (run_id), 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "summaries" VALUES(1,'{"ok": 12, "rows_kept": 3}','{"ok": 12, "rows_kept": 3}',X'0001020304050607');
INSERT INTO "summaries" VALUES(2,'{"ok": 12, "rows_kept": 3}','{"ok": 12, "rows_kept": 3}',X'0001020304050607');
INSERT INTO "summaries" VALUES(3,'{"ok": 12, "rows_kept": 3}','{"ok": 12, "rows_kept": 3}',X'0001020304050607');
CREATE TABLE trace_sources (
	id INTEGER NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	format VARCHAR(40) NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	files JSON NOT NULL, 
	options JSON NOT NULL, 
	summary JSON NOT NULL, 
	origin_utc VARCHAR(40), 
	block_size INTEGER, 
	hash_scope VARCHAR(20), 
	tool_version VARCHAR(40) NOT NULL, 
	created_at VARCHAR(40) NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
INSERT INTO "trace_sources" VALUES(1,'name 0 ''é"','format 0 ''é"','sha256 0 ''é"','[]','{"ok": 12, "rows_kept": 3}','{"ok": 12, "rows_kept": 3}','2023-11-16T18:15:46+00:00',1,'trace','tool_version 0 ''é"','2026-01-02T03:04:05+00:00');
INSERT INTO "trace_sources" VALUES(2,'name 1 ''é"','format 1 ''é"','sha256 1 ''é"','[]','{"ok": 12, "rows_kept": 3}','{"ok": 12, "rows_kept": 3}','2023-11-16T18:15:46+00:00',2,'trace','tool_version 1 ''é"','2026-01-02T03:04:05+00:00');
INSERT INTO "trace_sources" VALUES(3,'name 2 ''é"','format 2 ''é"','sha256 2 ''é"','[]','{"ok": 12, "rows_kept": 3}','{"ok": 12, "rows_kept": 3}','2023-11-16T18:15:46+00:00',3,'trace','tool_version 2 ''é"','2026-01-02T03:04:05+00:00');
CREATE TABLE traces (
	source_id INTEGER NOT NULL, 
	seq INTEGER NOT NULL, 
	source_line INTEGER NOT NULL, 
	arrival_us BIGINT NOT NULL, 
	prompt_tokens INTEGER NOT NULL, 
	output_tokens INTEGER, 
	status SMALLINT NOT NULL, 
	session_key TEXT, 
	hash_ids BLOB, turn INTEGER, parent_seq INTEGER, think_us BIGINT, source_ttft_us BIGINT, source_e2e_us BIGINT, 
	PRIMARY KEY (source_id, seq), 
	FOREIGN KEY(source_id) REFERENCES trace_sources (id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "traces" VALUES(1,1,1,1,1,1,0,'session_key 0 ''é"',X'0001020304050607',1,0,1,1,1);
INSERT INTO "traces" VALUES(2,2,2,2,2,2,0,'session_key 1 ''é"',X'0001020304050607',2,1,2,2,2);
INSERT INTO "traces" VALUES(3,3,3,3,3,3,0,'session_key 2 ''é"',X'0001020304050607',3,2,3,3,3);
CREATE INDEX ix_runs_group ON runs ("group");
CREATE INDEX ix_histograms_run_id ON histograms (run_id);
CREATE UNIQUE INDEX uq_samples ON samples (run_id, at_s, worker, role);
CREATE UNIQUE INDEX uq_recommendations ON recommendations ("key");
CREATE UNIQUE INDEX uq_fleet_changes ON fleet_changes (run_id, asked_s);
CREATE INDEX ix_decisions_run_id ON decisions (run_id);
CREATE INDEX ix_decisions_unix_s ON decisions (unix_s);
COMMIT;
