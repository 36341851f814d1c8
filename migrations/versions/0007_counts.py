"""The counts behind the figures of a long run: latencies by time and bin, beside what is kept of it already.

Frozen once released: a revision describes the schema of its day and imports no live code.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column(
        "summaries", sa.Column("latencies", sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb"))
    )


def downgrade() -> None:
    raise NotImplementedError("steelyard does not downgrade a database: restore the backup that migrate made")
