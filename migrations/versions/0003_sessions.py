"""Sessions: turn, parent and think time of a request, what the recorded system measured. Warm-up and workers' costs of a run.

Frozen once released: a revision describes the schema of its day and imports no live code.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    for name, kind in (
        ("turn", sa.Integer),
        ("parent_seq", sa.Integer),
        ("think_us", sa.BigInteger),
        ("source_ttft_us", sa.BigInteger),
        ("source_e2e_us", sa.BigInteger),
    ):
        op.add_column("traces", sa.Column(name, kind))
    op.add_column("runs", sa.Column("warmup_s", sa.Double, nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("costs", sa.JSON, nullable=False, server_default="{}"))


def downgrade() -> None:
    raise NotImplementedError("steelyard does not downgrade a database: restore the backup that migrate made")
