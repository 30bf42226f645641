"""What alembic runs for each command: the migrations, over the connection that it was handed."""

from __future__ import annotations

from alembic import context

from secagg_server.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # SQLite changes a table by making a new one.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
