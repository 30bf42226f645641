"""The key holder's signed verdict on an upload's norm."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Uploads of before have none."""
    op.add_column("uploads", sa.Column("verdict", sa.LargeBinary(), nullable=True))
