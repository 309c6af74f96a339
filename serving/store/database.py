"""A connection to the registry: SQLite with write-ahead log, or PostgreSQL, brought up to date by its migrations.

Knows no tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_SECONDS = 30
LOCK = 0x76626C6F7261  # of PostgreSQL's advisory locks: one server migrates at a time


class DatabaseError(Exception):
    """The registry cannot be opened or brought up to date. For the operator: shows no password."""


def sqlite_url(path: Path) -> str:
    """The address of a SQLite file."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def open_database(url: str) -> Engine:
    """Connect to `url` and run the migrations that it lacks. Raises `DatabaseError`."""
    shown = url.partition(":")[0]
    try:
        address = _address(url)
        shown = address.render_as_string(hide_password=True)
        engine = _connect(address)
        migrate(engine)
        return engine
    except (ArgumentError, SQLAlchemyError, ImportError, OSError) as error:
        raise DatabaseError(f"the registry at {shown} cannot be used: {_first_line(error)}") from error


def migrate(engine: Engine) -> None:
    """Bring the tables up to date, in one transaction, one server at a time."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
        config = _alembic()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def newest_revision() -> str:
    """The migration that this program's tables belong to."""
    return str(ScriptDirectory.from_config(_alembic()).get_current_head())


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def _address(url: str) -> URL:
    address = make_url(url)
    if address.get_backend_name() == "postgresql":
        return address.set(drivername="postgresql+psycopg")
    if address.get_backend_name() != "sqlite":
        raise ArgumentError("only sqlite and postgresql addresses are supported")
    return address


def _connect(address: URL) -> Engine:
    if address.get_backend_name() != "sqlite":
        return create_engine(address, pool_pre_ping=True)
    if address.database:
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(address, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # so that a transaction begins where we say
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Any) -> None:
    """Take the lock at once: a transaction that reads first and then writes could find it taken, and fail."""
    write = not connection.get_execution_options().get("readonly", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().split("\n")[0]
