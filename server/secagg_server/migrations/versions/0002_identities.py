"""Enrolled clients, signed round keys, deadlines that outlive a restart, and the audit log."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# SQLite leaves constraints without names, and one without a name cannot be dropped.
_NAMES = {"pk": "%(table_name)s_pkey"}
_ROUND = ("task_id", "round_number", "attempt")


def upgrade() -> None:
    """Add what is new, and name old uploads' clients by their keys."""
    _extend_rounds()
    _name_clients()
    op.create_table(
        "audit",
        sa.Column("sequence", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("time", sa.String(), nullable=False),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("details", sa.String(), nullable=False),
        sa.Column("previous", sa.LargeBinary(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
    )
    heartbeat = op.create_table(
        "heartbeat",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("beat", sa.Integer(), nullable=False),
    )
    op.execute(sa.insert(heartbeat).values(id=1, beat=0))


def _extend_rounds() -> None:
    new: list[sa.Column[Any]] = [
        sa.Column("round_key_identity", sa.LargeBinary()),
        sa.Column("round_key_signature", sa.LargeBinary()),
        sa.Column("audited", sa.Boolean()),
    ]
    with op.batch_alter_table("rounds") as batch:
        batch.add_column(sa.Column("closes_at", sa.DateTime(), nullable=True))
        batch.add_column(sa.Column("selected", sa.String(), nullable=True))
        for column in new:
            batch.add_column(column)
    rounds = sa.table("rounds", *(sa.column(column.name, column.type) for column in new))
    old = {"round_key_identity": b"", "round_key_signature": b"", "audited": False}
    op.execute(sa.update(rounds).values(old))
    with op.batch_alter_table("rounds") as batch:
        for column in new:
            batch.alter_column(column.name, existing_type=column.type, nullable=False)


def _name_clients() -> None:
    with op.batch_alter_table("uploads") as batch:
        batch.add_column(sa.Column("client", sa.String(), nullable=True))
    uploads = sa.table(
        "uploads",
        *(sa.column(name) for name in _ROUND),
        sa.column("client_key", sa.LargeBinary()),
        sa.column("client", sa.String()),
    )
    connection = op.get_bind()
    columns = [uploads.c[name] for name in (*_ROUND, "client_key")]
    for row in connection.execute(sa.select(*columns)).all():
        here = [column == value for column, value in zip(columns, row, strict=True)]
        named = sa.update(uploads).where(*here).values(client=row.client_key.hex())
        connection.execute(named)
    with op.batch_alter_table("uploads", naming_convention=_NAMES) as batch:
        batch.drop_constraint("uploads_pkey", type_="primary")
        batch.alter_column("client", existing_type=sa.String(), nullable=False)
        batch.alter_column("admission", existing_type=sa.LargeBinary(), nullable=True)
        batch.create_primary_key("uploads_pkey", [*_ROUND, "client"])
        batch.create_index("ix_uploads_upload_digest", ["upload_digest"])
