from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters import Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty catalog whose only adapter root is `<tmp_path>/root`."""
    root = tmp_path / "root"
    root.mkdir()
    return Site(tmp_path / "data", roots=(root,))
