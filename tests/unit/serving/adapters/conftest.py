from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters import Site
from tests.s3 import new_bucket


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[Site]:
    """An empty catalog whose only adapter root is `<tmp_path>/root`, on SQLite and on PostgreSQL."""
    root = tmp_path / "root"
    root.mkdir()
    site = Site(tmp_path / "data", roots=(root,), url=database_url)
    yield site
    site.close()


@pytest.fixture(params=["folder", "bucket"])
def stored_site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """An empty catalog on SQLite, with its bytes in a folder and in a bucket of S3."""
    bucket = None
    if request.param == "bucket":
        request.getfixturevalue("s3_server")
        bucket = new_bucket()
    site = Site(tmp_path / "data", keep_revisions=2, bucket=bucket)
    yield site
    site.close()
