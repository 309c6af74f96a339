"""Opening the registry's database: migrations, transactions, and errors that show no password."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, select

from serving.store.database import DatabaseError, migrate, newest_revision, open_database, sqlite_url
from serving.store.tables import metadata, tenants


def row(name: str) -> dict[str, object]:
    return {"name": name, "role": "tenant", "disabled": False, "weight": 1.0, "quotas": {}, "created": 0}


def test_a_new_database_has_the_tables_of_the_program(tmp_path: Path) -> None:
    engine = open_database(sqlite_url(tmp_path / "deep" / "registry.db"))
    with engine.begin() as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() == newest_revision()
        assert compare_metadata(context, metadata) == []
    migrate(engine)  # nothing left to do
    engine.dispose()


def test_what_is_written_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    for expected in ([], ["a"]):
        engine = open_database(sqlite_url(tmp_path / "registry.db"))
        with engine.begin() as connection:
            assert list(connection.scalars(select(tenants.c.name))) == expected
            if not expected:
                connection.execute(insert(tenants).values(row("a")))
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        engine.dispose()


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    """Each reads the number of rows and adds one of that name: no two may have read the same."""
    engine = open_database(sqlite_url(tmp_path / "registry.db"))

    def add() -> None:
        for _ in range(10):
            with engine.begin() as connection:
                count = len(connection.scalars(select(tenants.c.name)).all())
                connection.execute(insert(tenants).values(row(f"t{count}")))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with engine.begin() as connection:
        assert set(connection.scalars(select(tenants.c.name))) == {f"t{number}" for number in range(40)}
    engine.dispose()


@pytest.mark.parametrize("url", ["mysql://u:secret@h/d", "not an address", "postgresql://u:secret@127.0.0.1:1/d"])
def test_an_address_that_cannot_be_used_is_told_without_its_password(url: str) -> None:
    with pytest.raises(DatabaseError) as raised:
        open_database(url)
    assert "secret" not in str(raised.value)
