"""Runs the migrations on the connection that `serving.store.database` opened."""

from __future__ import annotations

from alembic import context

from serving.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
