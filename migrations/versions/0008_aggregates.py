"""Means of runs at a fixed concurrency, as others publish them; which version of the engine a run measured.

Frozen once released: a revision describes the schema of its day and imports no live code.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("runs", sa.Column("engine_version", sa.String(80), nullable=False, server_default=""))
    op.create_table(
        "aggregates",
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("concurrency", sa.Double, nullable=False),
        sa.Column("prompt_tokens", sa.Double, nullable=False),
        sa.Column("output_tokens", sa.Double, nullable=False),
        sa.Column("ttft_s", sa.Double, nullable=False),
        sa.Column("tpot_s", sa.Double, nullable=False),
    )


def downgrade() -> None:
    raise NotImplementedError("steelyard does not downgrade a database: restore the backup that migrate made")
