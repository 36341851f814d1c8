"""Mixed (colocated) workers: a run's fleet and a change of it have a third count. When a request was dispatched.

Frozen once released: a revision describes the schema of its day and imports no live code.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for table, columns in (("runs", ("mixed",)), ("fleet_changes", ("before_mixed", "after_mixed"))):
        for name in columns:
            op.add_column(table, sa.Column(name, sa.Integer, nullable=False, server_default="0"))
    op.add_column("observations", sa.Column("dispatch_s", sa.Double))
    op.execute("UPDATE observations SET dispatch_s = due_s")


def downgrade() -> None:
    raise NotImplementedError("steelyard does not downgrade a database: restore the backup that migrate made")
