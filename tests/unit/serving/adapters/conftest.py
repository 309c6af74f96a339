from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters import Site


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[Site]:
    """An empty catalog whose only adapter root is `<tmp_path>/root`, on SQLite and on PostgreSQL."""
    root = tmp_path / "root"
    root.mkdir()
    site = Site(tmp_path / "data", roots=(root,), url=database_url)
    yield site
    site.close()
