from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from serving.store.database import open_database, sqlite_url
from serving.tenancy.tenants import TenantRegistry


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(sqlite_url(tmp_path / "registry.db"))
    yield engine
    engine.dispose()


@pytest.fixture
def registry(database: Engine) -> TenantRegistry:
    return TenantRegistry(database)
