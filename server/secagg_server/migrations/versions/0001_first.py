"""Tasks, rounds and uploads, as they were before versions were written down."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.String(), primary_key=True),
        sa.Column("spec", sa.LargeBinary(), nullable=False),
        sa.Column("initial_model_digest", sa.LargeBinary(), nullable=False),
        sa.Column(
            "state", sa.Enum("RUNNING", "FINISHED", "FAILED", name="taskstate"), nullable=False
        ),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("rounds_done", sa.Integer(), nullable=False),
        sa.Column("model_version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
    )
    round_states = (
        "CREATED",
        "COLLECTING",
        "CHECKING",
        "SUMMING",
        "RELEASING",
        "DONE",
        "ABORTED",
    )
    op.create_table(
        "rounds",
        sa.Column("task_id", sa.String(), primary_key=True),
        sa.Column("round_number", sa.Integer(), primary_key=True),
        sa.Column("attempt", sa.Integer(), primary_key=True),
        sa.Column("state", sa.Enum(*round_states, name="roundstate"), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("round_key", sa.LargeBinary(), nullable=False),
        sa.Column("contributors", sa.Integer(), nullable=False),
        sa.Column("sums_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("model_version", sa.Integer(), nullable=False),
        sa.Column("aggregate_ms", sa.Double(), nullable=False),
        sa.Column("release_ms", sa.Double(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("ended_at", sa.DateTime(), nullable=True),
    )
    op.create_table(
        "uploads",
        sa.Column("task_id", sa.String(), primary_key=True),
        sa.Column("round_number", sa.Integer(), primary_key=True),
        sa.Column("attempt", sa.Integer(), primary_key=True),
        sa.Column("client_key", sa.LargeBinary(), primary_key=True),
        sa.Column("upload_digest", sa.LargeBinary(), nullable=False),
        sa.Column("admission", sa.LargeBinary(), nullable=False),
        sa.Column(
            "state",
            sa.Enum("RECEIVING", "ACCEPTED", "REJECTED", name="uploadstate"),
            nullable=False,
        ),
        sa.Column("reason", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task_id", "round_number", "attempt"],
            ["rounds.task_id", "rounds.round_number", "rounds.attempt"],
        ),
        sa.UniqueConstraint("task_id", "round_number", "attempt", "upload_digest"),
    )
