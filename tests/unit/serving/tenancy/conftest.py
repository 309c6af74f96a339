from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from serving.store.database import open_database
from serving.tenancy.tenants import TenantRegistry


@pytest.fixture
def database(database_url: str) -> Iterator[Engine]:
    """An empty registry, on SQLite and on PostgreSQL."""
    engine = open_database(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def registry(database: Engine) -> TenantRegistry:
    return TenantRegistry(database)
