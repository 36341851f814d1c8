"""Sessions: a request's turn, the request before it, the time in between; what the recorded system measured; warm-up.

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


def downgrade() -> None:
    raise NotImplementedError("steelyard does not downgrade a database: restore the backup that migrate made")
