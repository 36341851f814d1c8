"""Every row has a key of its own, so that what was sent twice is stored once; the figures of a run, kept with it.

Frozen once released: a revision describes the schema of its day and imports no live code.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0005"
down_revision = "0004"

KEYS = {
    "samples": ("run_id", "at_s", "worker", "role"),
    "fleet_changes": ("run_id", "asked_s"),
}


def upgrade() -> None:
    connection = op.get_bind()
    for name, key in KEYS.items():
        table = sa.table(name, sa.column("id"), *(sa.column(c) for c in key))
        # A copy that an interrupted transfer left behind; the first one stays. By way of a derived table: MariaDB does not
        # delete from what it reads.
        first = sa.select(sa.func.min(table.c.id).label("id")).group_by(*(table.c[c] for c in key)).subquery()
        connection.execute(table.delete().where(table.c.id.not_in(sa.select(first.c.id))))
        lengths = {"worker": 200} if name == "samples" else {}
        op.create_index(f"uq_{name}", name, list(key), unique=True, mysql_length=lengths, mariadb_length=lengths)
        op.drop_index(f"ix_{name}_run_id", name)  # the new one begins with the same column
    op.add_column("recommendations", sa.Column("key", sa.String(32)))
    op.create_index("uq_recommendations", "recommendations", ["key"], unique=True)
    op.create_table(
        "summaries",
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("figures", sa.JSON, nullable=False),
        sa.Column("bins", sa.JSON, nullable=False),
    )
    if connection.dialect.name in ("mysql", "mariadb"):  # a BLOB holds 64 KiB there
        op.alter_column("traces", "hash_ids", type_=mysql.LONGBLOB(), existing_type=sa.LargeBinary())


def downgrade() -> None:
    raise NotImplementedError("steelyard does not downgrade a database: restore the backup that migrate made")
