"""What a round tells of the model, by which a task may stop."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Rounds of before tell nothing."""
    op.add_column("rounds", sa.Column("figure", sa.Double(), nullable=True))
    op.add_column("rounds", sa.Column("model_change", sa.Double(), nullable=True))
