"""What servers tell: facts of a request, more readings of a worker, histograms over a run, where readings came from.

Frozen once released: a revision describes the schema of its day and imports no live code.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    for name, kind in (
        ("prefill_worker", sa.Text),
        ("decode_worker", sa.Text),
        ("queue_s", sa.Double),
        ("prefill_s", sa.Double),
        ("transfer_s", sa.Double),
        ("first_step_s", sa.Double),
        ("cached_tokens", sa.Integer),
        ("facts", sa.Text),
    ):
        op.add_column("observations", sa.Column(name, kind))
    for name in (
        "inflight_requests",
        "paused_requests",
        "transferring_requests",
        "transfer_s",
        "transfers_total",
        "transfer_bytes_total",
        "failed_transfers_total",
        "received_tokens_total",
        "lookup_tokens_total",
        "cached_tokens_total",
        "cache_hit_ratio",
        "gpu_busy_ratio",
    ):
        op.add_column("samples", sa.Column(name, sa.Double))
    op.add_column("runs", sa.Column("sources", sa.JSON, nullable=False, server_default="{}"))
    op.create_table(
        "histograms",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("role", sa.String(10), nullable=False),
        sa.Column("name", sa.String(40), nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("count", sa.Double, nullable=False),
        sa.Column("total", sa.Double, nullable=False),
        sa.Column("buckets", sa.JSON, nullable=False),
    )
    op.create_index("ix_histograms_run_id", "histograms", ["run_id"])


def downgrade() -> None:
    raise NotImplementedError("steelyard does not downgrade a database: restore the backup that migrate made")
