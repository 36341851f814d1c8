"""Alembic's environment: runs the revisions on the connection that traces.store hands over. Needs no live code."""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, transaction_per_migration=False, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
