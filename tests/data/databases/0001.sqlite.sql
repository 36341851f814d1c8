BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE fleet_changes (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	asked_s DOUBLE NOT NULL, 
	ready_s DOUBLE, 
	before_prefill INTEGER NOT NULL, 
	before_decode INTEGER NOT NULL, 
	after_prefill INTEGER NOT NULL, 
	after_decode INTEGER NOT NULL, 
	reason TEXT NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "fleet_changes" VALUES(1,1,1.0,2.0,3,5,2,6,'by hand');
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
	detail TEXT NOT NULL, 
	PRIMARY KEY (run_id, "index"), 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "observations" VALUES(1,0,0,0.0,0.0,0.0619996,0.0619996,3.07581660000000045585e+00,213,175,213,175,175,NULL,200,'ok','','');
INSERT INTO "observations" VALUES(1,1,0,0.900096,0.900096,0.9964376,0.9964376,2.89795640000000043201e+00,598,112,598,112,112,NULL,200,'ok','','');
INSERT INTO "observations" VALUES(1,2,0,1.407712,1.407712,1.4749744,1.4749744,2.82290400000000030189e+00,272,80,272,80,80,NULL,200,'ok','','');
INSERT INTO "observations" VALUES(1,3,0,1.713189,1.713189,1.86403180000000023852e+00,1.86403180000000023852e+00,6.45745280000000132503e+00,1209,267,1209,267,267,NULL,200,'ok','','');
INSERT INTO "observations" VALUES(1,4,0,1.784829,1.784829,1.8303266,1.8303266,2.86804640000000032884e+00,28,62,28,62,62,NULL,200,'ok','','');
INSERT INTO "observations" VALUES(1,5,0,2.226073,2.226073,2.29733600000000048879e+00,2.29733600000000048879e+00,5.44565540000000058995e+00,133,183,133,183,183,NULL,200,'ok','','');
INSERT INTO "observations" VALUES(1,6,0,3.29951,3.29951,3.36918080000000053075e+00,3.36918080000000053075e+00,5.1786538,299,107,299,107,107,NULL,200,'ok','','');
INSERT INTO "observations" VALUES(1,7,0,3.719624,3.719624,3.8858984,3.8858984,5.770225,1382,110,1382,110,110,NULL,200,'ok','','');
INSERT INTO "observations" VALUES(1,8,0,3.930809,3.930809,4.07406979999999929731e+00,4.07406979999999929731e+00,5.2975417999999994123e+00,1124,72,1124,72,72,NULL,200,'ok','','');
INSERT INTO "observations" VALUES(1,9,0,5.157585,5.157585,5.3003106,5.3003106,9.33613200000000098555e+00,1118,235,1118,235,235,NULL,200,'ok','','');
INSERT INTO "observations" VALUES(1,10,0,5.745277,5.745277,5.8092389999999989314e+00,5.8092389999999989314e+00,6.64478699999999911085e+00,235,50,235,50,50,NULL,200,'ok','','');
INSERT INTO "observations" VALUES(1,11,0,6.005997,6.005997,6.0581846,6.0581846,18.5022526,103,729,103,729,729,NULL,200,'ok','','');
CREATE TABLE recommendation_runs (
	recommendation_id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	PRIMARY KEY (recommendation_id, run_id), 
	FOREIGN KEY(recommendation_id) REFERENCES recommendations (id) ON DELETE CASCADE, 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
CREATE TABLE recommendations (
	id INTEGER NOT NULL, 
	created_at VARCHAR(40) NOT NULL, 
	kind VARCHAR(40) NOT NULL, 
	answer JSON NOT NULL, 
	data_hash VARCHAR(64) NOT NULL, 
	version VARCHAR(40) NOT NULL, 
	seed BIGINT NOT NULL, 
	PRIMARY KEY (id)
);
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
	counts JSON NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE ("key")
);
INSERT INTO "runs" VALUES(1,'f3943013601f427d981e891c7d0152bf','old','','synthetic','d31d3def23d920b3c78443bd07dc31c16ad68835070d24f6c63c7e9e9f33aa87',12,'http://127.0.0.1:1','reference','demo','',3,5,1,1,1.0,2,1.0,NULL,'[]','static',0,'ttft<0.5s','',1,1,'valid','',NULL,NULL,NULL,'{"ok": 12}');
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
	transfer_s_total DOUBLE, 
	PRIMARY KEY (id), 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "samples" VALUES(1,1,0.5,'0','prefill',1.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
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
CREATE TABLE traces (
	source_id INTEGER NOT NULL, 
	seq INTEGER NOT NULL, 
	source_line INTEGER NOT NULL, 
	arrival_us BIGINT NOT NULL, 
	prompt_tokens INTEGER NOT NULL, 
	output_tokens INTEGER, 
	status SMALLINT NOT NULL, 
	session_key TEXT, 
	hash_ids BLOB, 
	PRIMARY KEY (source_id, seq), 
	FOREIGN KEY(source_id) REFERENCES trace_sources (id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
CREATE INDEX ix_runs_group ON runs ("group");
CREATE INDEX ix_samples_run_id ON samples (run_id);
CREATE INDEX ix_fleet_changes_run_id ON fleet_changes (run_id);
COMMIT;
