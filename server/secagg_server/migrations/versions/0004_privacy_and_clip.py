"""What releases have cost of a task's privacy budget, and a clip norm that changes by the round."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Tasks of before have spent nothing, and clip as their plans say."""
    op.add_column("tasks", sa.Column("clip", sa.Double(), nullable=True))
    op.add_column("rounds", sa.Column("clip", sa.Double(), nullable=True))
    with op.batch_alter_table("tasks") as batch:
        batch.add_column(sa.Column("rho_spent", sa.Double(), nullable=True))
    tasks = sa.table("tasks", sa.column("rho_spent", sa.Double()))
    op.execute(sa.update(tasks).values(rho_spent=0.0))
    with op.batch_alter_table("tasks") as batch:
        batch.alter_column("rho_spent", existing_type=sa.Double(), nullable=False)
