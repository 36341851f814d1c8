"""What a change of P:D cost, also outside a run; every decision of the online controller with its reason.

Frozen once released: a revision describes the schema of its day and imports no live code.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    with op.batch_alter_table("fleet_changes") as table:
        table.alter_column("run_id", existing_type=sa.Integer, nullable=True)
        table.add_column(sa.Column("control", sa.String(400), nullable=False, server_default=""))
        table.add_column(sa.Column("asked_unix_s", sa.Double))
        table.add_column(sa.Column("joined_s", sa.Double))
        table.add_column(sa.Column("first_served_s", sa.Double))
        table.add_column(sa.Column("in_flight", sa.Integer))
        table.add_column(sa.Column("failed", sa.Integer))
        table.add_column(sa.Column("slowed", sa.Integer))
    op.create_table(
        "decisions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="CASCADE"), index=True),
        sa.Column("control", sa.String(400), nullable=False),
        sa.Column("unix_s", sa.Double, nullable=False, index=True),
        sa.Column("at_s", sa.Double, nullable=False),
        sa.Column("until_s", sa.Double, nullable=False),
        sa.Column("action", sa.String(20), nullable=False),
        sa.Column("fleet_before", sa.String(40)),
        sa.Column("fleet_after", sa.String(40)),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("repeats", sa.Integer, nullable=False),
    )


def downgrade() -> None:
    raise NotImplementedError("steelyard does not downgrade a database: restore the backup that migrate made")
