"""What every test gets: no hub, the marker of its folder, PostgreSQL and Redis where they are installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import postgres, redis, s3
from vblora import kernels

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports `transformers`; child processes inherit it

TESTS = Path(__file__).parent
FOLDERS = ("unit", "integration", "e2e")


POSTGRES = postgres.find_programs()
NEEDED = {"postgres": ("PostgreSQL", POSTGRES, "postgresql-15"), "redis": ("Redis", redis.PROGRAM, "redis-server")}
missed_tests = pytest.StashKey[dict[str, int]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)
    config.stash[missed_tests] = {mark: _leave_out(config, items, mark) for mark, need in NEEDED.items() if not need[1]}


def _leave_out(config: pytest.Config, items: list[pytest.Item], mark: str) -> int:
    """Deselect the tests that carry this mark; returns how many they are."""
    unable = [item for item in items if item.get_closest_marker(mark)]
    items[:] = [item for item in items if item not in unable]
    config.hook.pytest_deselected(items=unable)
    return len(unable)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for mark, missed in config.stash.get(missed_tests, {}).items():
        name, _, package = NEEDED[mark]
        if missed:
            terminalreporter.write_sep("=", f"{name} is not installed", yellow=True)
            terminalreporter.write_line(f"{missed} tests marked `{mark}` did not run: apt-get install {package}")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Postgres]:
    """A PostgreSQL of this session's own; only for tests marked `postgres`."""
    assert POSTGRES is not None, "mark the test `postgres`"
    with postgres.running(POSTGRES) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[None]:
    """An S3 of this session's own, to which the environment leads; `tests.s3.new_bucket` is a place in it."""
    with s3.running():
        yield


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty registry, in SQLite and in PostgreSQL."""
    from serving.store.database import sqlite_url  # late: it brings transformers along

    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "data" / "registry.db")
        return
    server: postgres.Postgres = request.getfixturevalue("postgres_server")
    with server.database() as url:
        yield url


@pytest.fixture(params=[True, False], ids=["kernels", "torch only"])
def either_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs with the compiled kernels, and with torch's operations in their place."""
    assert kernels.available, "the kernels are not built: `make .venv/installed`"
    monkeypatch.setattr(kernels, "available", request.param)
