CREATE TABLE public.aggregates (
    run_id integer NOT NULL,
    concurrency double precision NOT NULL,
    prompt_tokens double precision NOT NULL,
    output_tokens double precision NOT NULL,
    ttft_s double precision NOT NULL,
    tpot_s double precision NOT NULL
);
CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.decisions (
    id integer NOT NULL,
    run_id integer,
    control character varying(400) NOT NULL,
    unix_s double precision NOT NULL,
    at_s double precision NOT NULL,
    until_s double precision NOT NULL,
    action character varying(20) NOT NULL,
    fleet_before character varying(40),
    fleet_after character varying(40),
    reason text NOT NULL,
    repeats integer NOT NULL
);
CREATE SEQUENCE public.decisions_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.decisions_id_seq OWNED BY public.decisions.id;
CREATE TABLE public.fleet_changes (
    id integer NOT NULL,
    run_id integer,
    asked_s double precision NOT NULL,
    ready_s double precision,
    before_prefill integer NOT NULL,
    before_decode integer NOT NULL,
    after_prefill integer NOT NULL,
    after_decode integer NOT NULL,
    reason text NOT NULL,
    before_mixed integer DEFAULT 0 NOT NULL,
    after_mixed integer DEFAULT 0 NOT NULL,
    control character varying(400) DEFAULT ''::character varying NOT NULL,
    asked_unix_s double precision,
    joined_s double precision,
    first_served_s double precision,
    in_flight integer,
    failed integer,
    slowed integer
);
CREATE SEQUENCE public.fleet_changes_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.fleet_changes_id_seq OWNED BY public.fleet_changes.id;
CREATE TABLE public.histograms (
    id integer NOT NULL,
    run_id integer NOT NULL,
    worker text NOT NULL,
    role character varying(10) NOT NULL,
    name character varying(40) NOT NULL,
    source text NOT NULL,
    count double precision NOT NULL,
    total double precision NOT NULL,
    buckets json NOT NULL
);
CREATE SEQUENCE public.histograms_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.histograms_id_seq OWNED BY public.histograms.id;
CREATE TABLE public.observations (
    run_id integer NOT NULL,
    index bigint NOT NULL,
    worker smallint,
    due_s double precision,
    sent_s double precision,
    first_byte_s double precision,
    first_token_s double precision,
    last_token_s double precision,
    requested_prompt_tokens integer,
    requested_tokens integer,
    prompt_tokens integer,
    output_tokens integer,
    chunks integer,
    max_gap_s double precision,
    http_status smallint,
    status character varying(9) NOT NULL,
    error character varying(16) NOT NULL,
    detail text NOT NULL,
    dispatch_s double precision,
    prefill_worker text,
    decode_worker text,
    queue_s double precision,
    prefill_s double precision,
    transfer_s double precision,
    first_step_s double precision,
    cached_tokens integer,
    facts text
);
CREATE TABLE public.recommendation_runs (
    recommendation_id integer NOT NULL,
    run_id integer NOT NULL
);
CREATE TABLE public.recommendations (
    id integer NOT NULL,
    created_at character varying(40) NOT NULL,
    kind character varying(40) NOT NULL,
    answer json NOT NULL,
    data_hash character varying(64) NOT NULL,
    version character varying(40) NOT NULL,
    seed bigint NOT NULL,
    key character varying(32)
);
CREATE SEQUENCE public.recommendations_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.recommendations_id_seq OWNED BY public.recommendations.id;
CREATE TABLE public.runs (
    id integer NOT NULL,
    key character varying(32) NOT NULL,
    name text NOT NULL,
    "group" character varying(200) NOT NULL,
    trace character varying(200) NOT NULL,
    schedule_digest character varying(64) NOT NULL,
    scheduled integer NOT NULL,
    endpoint text NOT NULL,
    engine character varying(40) NOT NULL,
    model text NOT NULL,
    profile text NOT NULL,
    prefill integer,
    decode integer,
    prefill_gpus integer NOT NULL,
    decode_gpus integer NOT NULL,
    started_unix_s double precision NOT NULL,
    workers integer NOT NULL,
    rate_factor double precision NOT NULL,
    rate_per_s double precision,
    changes json NOT NULL,
    policy character varying(40) NOT NULL,
    seed bigint NOT NULL,
    slo text NOT NULL,
    version character varying(40) NOT NULL,
    ended boolean NOT NULL,
    complete boolean NOT NULL,
    verdict character varying(10) NOT NULL,
    reason text NOT NULL,
    lag_p50_ms double precision,
    lag_p99_ms double precision,
    lag_max_ms double precision,
    counts json NOT NULL,
    mixed integer DEFAULT 0 NOT NULL,
    warmup_s double precision DEFAULT '0'::double precision NOT NULL,
    costs json DEFAULT '{}'::json NOT NULL,
    sources json DEFAULT '{}'::json NOT NULL,
    engine_version character varying(80) DEFAULT ''::character varying NOT NULL
);
CREATE SEQUENCE public.runs_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.runs_id_seq OWNED BY public.runs.id;
CREATE TABLE public.samples (
    id bigint NOT NULL,
    run_id integer NOT NULL,
    at_s double precision NOT NULL,
    worker text NOT NULL,
    role character varying(10) NOT NULL,
    waiting_requests double precision,
    running_requests double precision,
    waiting_tokens double precision,
    kv_used_tokens double precision,
    kv_used_ratio double precision,
    busy_s_total double precision,
    steps_total double precision,
    prompt_tokens_total double precision,
    output_tokens_total double precision,
    finished_total double precision,
    preemptions_total double precision,
    transfer_s_total double precision,
    inflight_requests double precision,
    paused_requests double precision,
    transferring_requests double precision,
    transfer_s double precision,
    transfers_total double precision,
    transfer_bytes_total double precision,
    failed_transfers_total double precision,
    received_tokens_total double precision,
    lookup_tokens_total double precision,
    cached_tokens_total double precision,
    cache_hit_ratio double precision,
    gpu_busy_ratio double precision
);
CREATE SEQUENCE public.samples_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.samples_id_seq OWNED BY public.samples.id;
CREATE TABLE public.summaries (
    run_id integer NOT NULL,
    figures json NOT NULL,
    bins json NOT NULL,
    latencies bytea
);
CREATE TABLE public.trace_sources (
    id integer NOT NULL,
    name character varying(200) NOT NULL,
    format character varying(40) NOT NULL,
    sha256 character varying(64) NOT NULL,
    files json NOT NULL,
    options json NOT NULL,
    summary json NOT NULL,
    origin_utc character varying(40),
    block_size integer,
    hash_scope character varying(20),
    tool_version character varying(40) NOT NULL,
    created_at character varying(40) NOT NULL
);
CREATE SEQUENCE public.trace_sources_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trace_sources_id_seq OWNED BY public.trace_sources.id;
CREATE TABLE public.traces (
    source_id integer NOT NULL,
    seq integer NOT NULL,
    source_line integer NOT NULL,
    arrival_us bigint NOT NULL,
    prompt_tokens integer NOT NULL,
    output_tokens integer,
    status smallint NOT NULL,
    session_key text,
    hash_ids bytea,
    turn integer,
    parent_seq integer,
    think_us bigint,
    source_ttft_us bigint,
    source_e2e_us bigint
);
ALTER TABLE ONLY public.decisions ALTER COLUMN id SET DEFAULT nextval('public.decisions_id_seq'::regclass);
ALTER TABLE ONLY public.fleet_changes ALTER COLUMN id SET DEFAULT nextval('public.fleet_changes_id_seq'::regclass);
ALTER TABLE ONLY public.histograms ALTER COLUMN id SET DEFAULT nextval('public.histograms_id_seq'::regclass);
ALTER TABLE ONLY public.recommendations ALTER COLUMN id SET DEFAULT nextval('public.recommendations_id_seq'::regclass);
ALTER TABLE ONLY public.runs ALTER COLUMN id SET DEFAULT nextval('public.runs_id_seq'::regclass);
ALTER TABLE ONLY public.samples ALTER COLUMN id SET DEFAULT nextval('public.samples_id_seq'::regclass);
ALTER TABLE ONLY public.trace_sources ALTER COLUMN id SET DEFAULT nextval('public.trace_sources_id_seq'::regclass);
INSERT INTO public.aggregates VALUES (1, 0.1, 0.1, 0.1, 0.1, 0.1);
INSERT INTO public.aggregates VALUES (2, 1.1, 1.1, 1.1, 1.1, 1.1);
INSERT INTO public.aggregates VALUES (3, 2.1, 2.1, 2.1, 2.1, 2.1);
INSERT INTO public.alembic_version VALUES ('0008');
INSERT INTO public.decisions VALUES (1, 1, 'control 0 ''é"', 0.1, 0.1, 0.1, 'action 0 ''é"', 'fleet_before 0 ''é"', 'fleet_after 0 ''é"', 'reason 0 ''é"', 1);
INSERT INTO public.decisions VALUES (2, 2, 'control 1 ''é"', 1.1, 1.1, 1.1, 'action 1 ''é"', 'fleet_before 1 ''é"', 'fleet_after 1 ''é"', 'reason 1 ''é"', 2);
INSERT INTO public.decisions VALUES (3, 3, 'control 2 ''é"', 2.1, 2.1, 2.1, 'action 2 ''é"', 'fleet_before 2 ''é"', 'fleet_after 2 ''é"', 'reason 2 ''é"', 3);
INSERT INTO public.fleet_changes VALUES (1, 1, 0.1, 0.1, 1, 1, 1, 1, 'reason 0 ''é"', 1, 1, 'control 0 ''é"', 0.1, 0.1, 0.1, 1, 1, 1);
INSERT INTO public.fleet_changes VALUES (2, 2, 1.1, 1.1, 2, 2, 2, 2, 'reason 1 ''é"', 2, 2, 'control 1 ''é"', 1.1, 1.1, 1.1, 2, 2, 2);
INSERT INTO public.fleet_changes VALUES (3, 3, 2.1, 2.1, 3, 3, 3, 3, 'reason 2 ''é"', 3, 3, 'control 2 ''é"', 2.1, 2.1, 2.1, 3, 3, 3);
INSERT INTO public.histograms VALUES (1, 1, 'worker 0 ''é"', 'decode', 'name 0 ''é"', 'source 0 ''é"', 0.1, 0.1, '[[0.5, 1.0], [null, 2.0]]');
INSERT INTO public.histograms VALUES (2, 2, 'worker 1 ''é"', 'decode', 'name 1 ''é"', 'source 1 ''é"', 1.1, 1.1, '[[0.5, 1.0], [null, 2.0]]');
INSERT INTO public.histograms VALUES (3, 3, 'worker 2 ''é"', 'decode', 'name 2 ''é"', 'source 2 ''é"', 2.1, 2.1, '[[0.5, 1.0], [null, 2.0]]');
INSERT INTO public.observations VALUES (1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 1, 1, 1, 1, 1, 0.1, 1, 'ok', '', 'detail 0 ''é"', 0.1, 'prefill_worker 0 ''é"', 'decode_worker 0 ''é"', 0.1, 0.1, 0.1, 0.1, 1, 'facts 0 ''é"');
INSERT INTO public.observations VALUES (2, 2, 2, 1.1, 1.1, 1.1, 1.1, 1.1, 2, 2, 2, 2, 2, 1.1, 2, 'ok', '', 'detail 1 ''é"', 1.1, 'prefill_worker 1 ''é"', 'decode_worker 1 ''é"', 1.1, 1.1, 1.1, 1.1, 2, 'facts 1 ''é"');
INSERT INTO public.observations VALUES (3, 3, 3, 2.1, 2.1, 2.1, 2.1, 2.1, 3, 3, 3, 3, 3, 2.1, 3, 'ok', '', 'detail 2 ''é"', 2.1, 'prefill_worker 2 ''é"', 'decode_worker 2 ''é"', 2.1, 2.1, 2.1, 2.1, 3, 'facts 2 ''é"');
INSERT INTO public.recommendation_runs VALUES (1, 1);
INSERT INTO public.recommendation_runs VALUES (2, 2);
INSERT INTO public.recommendation_runs VALUES (3, 3);
INSERT INTO public.recommendations VALUES (1, '2026-01-02T03:04:05+00:00', 'kind 0 ''é"', '{"ok": 12, "rows_kept": 3}', 'data_hash 0 ''é"', 'version 0 ''é"', 1, 'key 0 ''é"');
INSERT INTO public.recommendations VALUES (2, '2026-01-02T03:04:05+00:00', 'kind 1 ''é"', '{"ok": 12, "rows_kept": 3}', 'data_hash 1 ''é"', 'version 1 ''é"', 2, 'key 1 ''é"');
INSERT INTO public.recommendations VALUES (3, '2026-01-02T03:04:05+00:00', 'kind 2 ''é"', '{"ok": 12, "rows_kept": 3}', 'data_hash 2 ''é"', 'version 2 ''é"', 3, 'key 2 ''é"');
INSERT INTO public.runs VALUES (1, 'key 0 ''é"', 'name 0 ''é"', 'group 0 ''é"', 'trace 0 ''é"', 'schedule_digest 0 ''é"', 1, 'endpoint 0 ''é"', 'engine 0 ''é"', 'model 0 ''é"', 'profile 0 ''é"', 1, 1, 1, 1, 0.1, 1, 0.1, 0.1, '["rate x2"]', 'static', 1, 'ttft<0.5s', 'version 0 ''é"', true, true, 'valid', 'reason 0 ''é"', 0.1, 0.1, 0.1, '{"ok": 12, "rows_kept": 3}', 1, 0.1, '{"ok": 12, "rows_kept": 3}', '{"ok": 12, "rows_kept": 3}', 'engine_version 0 ''é"');
INSERT INTO public.runs VALUES (2, 'key 1 ''é"', 'name 1 ''é"', 'group 1 ''é"', 'trace 1 ''é"', 'schedule_digest 1 ''é"', 2, 'endpoint 1 ''é"', 'engine 1 ''é"', 'model 1 ''é"', 'profile 1 ''é"', 2, 2, 2, 2, 1.1, 2, 1.1, 1.1, '["rate x2"]', 'static', 2, 'ttft<0.5s', 'version 1 ''é"', true, true, 'valid', 'reason 1 ''é"', 1.1, 1.1, 1.1, '{"ok": 12, "rows_kept": 3}', 2, 1.1, '{"ok": 12, "rows_kept": 3}', '{"ok": 12, "rows_kept": 3}', 'engine_version 1 ''é"');
INSERT INTO public.runs VALUES (3, 'key 2 ''é"', 'name 2 ''é"', 'group 2 ''é"', 'trace 2 ''é"', 'schedule_digest 2 ''é"', 3, 'endpoint 2 ''é"', 'engine 2 ''é"', 'model 2 ''é"', 'profile 2 ''é"', 3, 3, 3, 3, 2.1, 3, 2.1, 2.1, '["rate x2"]', 'static', 3, 'ttft<0.5s', 'version 2 ''é"', true, true, 'valid', 'reason 2 ''é"', 2.1, 2.1, 2.1, '{"ok": 12, "rows_kept": 3}', 3, 2.1, '{"ok": 12, "rows_kept": 3}', '{"ok": 12, "rows_kept": 3}', 'engine_version 2 ''é"');
INSERT INTO public.samples VALUES (1, 1, 0.1, 'worker 0 ''é"', 'decode', 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1);
INSERT INTO public.samples VALUES (2, 2, 1.1, 'worker 1 ''é"', 'decode', 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1);
INSERT INTO public.samples VALUES (3, 3, 2.1, 'worker 2 ''é"', 'decode', 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1);
INSERT INTO public.summaries VALUES (1, '{"ok": 12, "rows_kept": 3}', '{"ok": 12, "rows_kept": 3}', '\x0001020304050607');
INSERT INTO public.summaries VALUES (2, '{"ok": 12, "rows_kept": 3}', '{"ok": 12, "rows_kept": 3}', '\x0001020304050607');
INSERT INTO public.summaries VALUES (3, '{"ok": 12, "rows_kept": 3}', '{"ok": 12, "rows_kept": 3}', '\x0001020304050607');
INSERT INTO public.trace_sources VALUES (1, 'name 0 ''é"', 'format 0 ''é"', 'sha256 0 ''é"', '[]', '{"ok": 12, "rows_kept": 3}', '{"ok": 12, "rows_kept": 3}', '2023-11-16T18:15:46+00:00', 1, 'trace', 'tool_version 0 ''é"', '2026-01-02T03:04:05+00:00');
INSERT INTO public.trace_sources VALUES (2, 'name 1 ''é"', 'format 1 ''é"', 'sha256 1 ''é"', '[]', '{"ok": 12, "rows_kept": 3}', '{"ok": 12, "rows_kept": 3}', '2023-11-16T18:15:46+00:00', 2, 'trace', 'tool_version 1 ''é"', '2026-01-02T03:04:05+00:00');
INSERT INTO public.trace_sources VALUES (3, 'name 2 ''é"', 'format 2 ''é"', 'sha256 2 ''é"', '[]', '{"ok": 12, "rows_kept": 3}', '{"ok": 12, "rows_kept": 3}', '2023-11-16T18:15:46+00:00', 3, 'trace', 'tool_version 2 ''é"', '2026-01-02T03:04:05+00:00');
INSERT INTO public.traces VALUES (1, 1, 1, 1, 1, 1, 0, 'session_key 0 ''é"', '\x0001020304050607', 1, 0, 1, 1, 1);
INSERT INTO public.traces VALUES (2, 2, 2, 2, 2, 2, 0, 'session_key 1 ''é"', '\x0001020304050607', 2, 1, 2, 2, 2);
INSERT INTO public.traces VALUES (3, 3, 3, 3, 3, 3, 0, 'session_key 2 ''é"', '\x0001020304050607', 3, 2, 3, 3, 3);
SELECT pg_catalog.setval('public.decisions_id_seq', 1, false);
SELECT pg_catalog.setval('public.fleet_changes_id_seq', 1, false);
SELECT pg_catalog.setval('public.histograms_id_seq', 1, false);
SELECT pg_catalog.setval('public.recommendations_id_seq', 1, false);
SELECT pg_catalog.setval('public.runs_id_seq', 1, false);
SELECT pg_catalog.setval('public.samples_id_seq', 1, false);
SELECT pg_catalog.setval('public.trace_sources_id_seq', 1, false);
ALTER TABLE ONLY public.aggregates
    ADD CONSTRAINT aggregates_pkey PRIMARY KEY (run_id);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.decisions
    ADD CONSTRAINT decisions_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.fleet_changes
    ADD CONSTRAINT fleet_changes_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.histograms
    ADD CONSTRAINT histograms_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.observations
    ADD CONSTRAINT observations_pkey PRIMARY KEY (run_id, index);
ALTER TABLE ONLY public.recommendation_runs
    ADD CONSTRAINT recommendation_runs_pkey PRIMARY KEY (recommendation_id, run_id);
ALTER TABLE ONLY public.recommendations
    ADD CONSTRAINT recommendations_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.runs
    ADD CONSTRAINT runs_key_key UNIQUE (key);
ALTER TABLE ONLY public.runs
    ADD CONSTRAINT runs_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.samples
    ADD CONSTRAINT samples_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.summaries
    ADD CONSTRAINT summaries_pkey PRIMARY KEY (run_id);
ALTER TABLE ONLY public.trace_sources
    ADD CONSTRAINT trace_sources_name_key UNIQUE (name);
ALTER TABLE ONLY public.trace_sources
    ADD CONSTRAINT trace_sources_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.traces
    ADD CONSTRAINT traces_pkey PRIMARY KEY (source_id, seq);
CREATE INDEX ix_decisions_run_id ON public.decisions USING btree (run_id);
CREATE INDEX ix_decisions_unix_s ON public.decisions USING btree (unix_s);
CREATE INDEX ix_histograms_run_id ON public.histograms USING btree (run_id);
CREATE INDEX ix_runs_group ON public.runs USING btree ("group");
CREATE UNIQUE INDEX uq_fleet_changes ON public.fleet_changes USING btree (run_id, asked_s);
CREATE UNIQUE INDEX uq_recommendations ON public.recommendations USING btree (key);
CREATE UNIQUE INDEX uq_samples ON public.samples USING btree (run_id, at_s, worker, role);
ALTER TABLE ONLY public.aggregates
    ADD CONSTRAINT aggregates_run_id_fkey FOREIGN KEY (run_id) REFERENCES public.runs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.decisions
    ADD CONSTRAINT decisions_run_id_fkey FOREIGN KEY (run_id) REFERENCES public.runs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.fleet_changes
    ADD CONSTRAINT fleet_changes_run_id_fkey FOREIGN KEY (run_id) REFERENCES public.runs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.histograms
    ADD CONSTRAINT histograms_run_id_fkey FOREIGN KEY (run_id) REFERENCES public.runs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.observations
    ADD CONSTRAINT observations_run_id_fkey FOREIGN KEY (run_id) REFERENCES public.runs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.recommendation_runs
    ADD CONSTRAINT recommendation_runs_recommendation_id_fkey FOREIGN KEY (recommendation_id) REFERENCES public.recommendations(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.recommendation_runs
    ADD CONSTRAINT recommendation_runs_run_id_fkey FOREIGN KEY (run_id) REFERENCES public.runs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.samples
    ADD CONSTRAINT samples_run_id_fkey FOREIGN KEY (run_id) REFERENCES public.runs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.summaries
    ADD CONSTRAINT summaries_run_id_fkey FOREIGN KEY (run_id) REFERENCES public.runs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.traces
    ADD CONSTRAINT traces_source_id_fkey FOREIGN KEY (source_id) REFERENCES public.trace_sources(id) ON DELETE CASCADE;
