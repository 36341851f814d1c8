"""${message}

Frozen once released: a revision describes the schema of its day and imports no live code.
"""

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    raise NotImplementedError("steelyard does not downgrade databases: restore the backup that migrate made")
