"""What every test gets: no hub, and the marker of the folder it stands in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vblora import kernels

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports `transformers`; child processes inherit it

TESTS = Path(__file__).parent
FOLDERS = ("unit", "integration", "e2e")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)


@pytest.fixture(params=[True, False], ids=["kernels", "torch only"])
def either_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs with the compiled kernels, and with torch's operations in their place."""
    assert kernels.available, "the kernels are not built: `make .venv/installed`"
    monkeypatch.setattr(kernels, "available", request.param)
