"""The first schema: traces, runs, observations, samples, fleet changes, recommendations.

Frozen once released: a revision describes the schema of its day and imports no live code.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "trace_sources",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(200), nullable=False, unique=True),
        sa.Column("format", sa.String(40), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("options", sa.JSON, nullable=False),
        sa.Column("summary", sa.JSON, nullable=False),
        sa.Column("origin_utc", sa.String(40)),
        sa.Column("block_size", sa.Integer),
        sa.Column("hash_scope", sa.String(20)),
        sa.Column("tool_version", sa.String(40), nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
    )
    op.create_table(
        "traces",
        sa.Column("source_id", sa.Integer, sa.ForeignKey("trace_sources.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("source_line", sa.Integer, nullable=False),
        sa.Column("arrival_us", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("output_tokens", sa.Integer),
        sa.Column("status", sa.SmallInteger, nullable=False),
        sa.Column("session_key", sa.Text),
        sa.Column("hash_ids", sa.LargeBinary),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", sa.String(32), nullable=False, unique=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("group", sa.String(200), nullable=False, index=True),
        sa.Column("trace", sa.String(200), nullable=False),
        sa.Column("schedule_digest", sa.String(64), nullable=False),
        sa.Column("scheduled", sa.Integer, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("engine", sa.String(40), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("profile", sa.Text, nullable=False),
        sa.Column("prefill", sa.Integer),
        sa.Column("decode", sa.Integer),
        sa.Column("prefill_gpus", sa.Integer, nullable=False),
        sa.Column("decode_gpus", sa.Integer, nullable=False),
        sa.Column("started_unix_s", sa.Double, nullable=False),
        sa.Column("workers", sa.Integer, nullable=False),
        sa.Column("rate_factor", sa.Double, nullable=False),
        sa.Column("rate_per_s", sa.Double),
        sa.Column("changes", sa.JSON, nullable=False),
        sa.Column("policy", sa.String(40), nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("slo", sa.Text, nullable=False),
        sa.Column("version", sa.String(40), nullable=False),
        sa.Column("ended", sa.Boolean, nullable=False),
        sa.Column("complete", sa.Boolean, nullable=False),
        sa.Column("verdict", sa.String(10), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("lag_p50_ms", sa.Double),
        sa.Column("lag_p99_ms", sa.Double),
        sa.Column("lag_max_ms", sa.Double),
        sa.Column("counts", sa.JSON, nullable=False),
    )
    op.create_table(
        "observations",
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("index", sa.BigInteger, primary_key=True),
        sa.Column("worker", sa.SmallInteger),
        sa.Column("due_s", sa.Double),
        sa.Column("sent_s", sa.Double),
        sa.Column("first_byte_s", sa.Double),
        sa.Column("first_token_s", sa.Double),
        sa.Column("last_token_s", sa.Double),
        sa.Column("requested_prompt_tokens", sa.Integer),
        sa.Column("requested_tokens", sa.Integer),
        sa.Column("prompt_tokens", sa.Integer),
        sa.Column("output_tokens", sa.Integer),
        sa.Column("chunks", sa.Integer),
        sa.Column("max_gap_s", sa.Double),
        sa.Column("http_status", sa.SmallInteger),
        sa.Column("status", sa.String(9), nullable=False),
        sa.Column("error", sa.String(16), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "samples",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False, index=True),
        sa.Column("at_s", sa.Double, nullable=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("role", sa.String(10), nullable=False),
        sa.Column("waiting_requests", sa.Double),
        sa.Column("running_requests", sa.Double),
        sa.Column("waiting_tokens", sa.Double),
        sa.Column("kv_used_tokens", sa.Double),
        sa.Column("kv_used_ratio", sa.Double),
        sa.Column("busy_s_total", sa.Double),
        sa.Column("steps_total", sa.Double),
        sa.Column("prompt_tokens_total", sa.Double),
        sa.Column("output_tokens_total", sa.Double),
        sa.Column("finished_total", sa.Double),
        sa.Column("preemptions_total", sa.Double),
        sa.Column("transfer_s_total", sa.Double),
    )
    op.create_table(
        "fleet_changes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False, index=True),
        sa.Column("asked_s", sa.Double, nullable=False),
        sa.Column("ready_s", sa.Double),
        sa.Column("before_prefill", sa.Integer, nullable=False),
        sa.Column("before_decode", sa.Integer, nullable=False),
        sa.Column("after_prefill", sa.Integer, nullable=False),
        sa.Column("after_decode", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_table(
        "recommendations",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("answer", sa.JSON, nullable=False),
        sa.Column("data_hash", sa.String(64), nullable=False),
        sa.Column("version", sa.String(40), nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "recommendation_runs",
        sa.Column(
            "recommendation_id", sa.Integer, sa.ForeignKey("recommendations.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    )


def downgrade() -> None:
    raise NotImplementedError("steelyard does not downgrade databases: restore the backup that migrate made")
