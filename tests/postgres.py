"""A private PostgreSQL for tests marked `postgres`: its own data, its own port on loopback, gone with the session.

PostgreSQL refuses to run as root; where the tests do, it runs as the user `postgres` or `nobody`.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

PROGRAMS = ("initdb", "postgres")
PATIENCE_SECONDS = 60.0
_TEMPLATE = "migrated"
# What a test needs is lost with the session anyway.
_FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")
_numbers = count()


def find_programs() -> Path | None:
    """The folder of PostgreSQL's programs; None where it is not installed."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    on_path = [Path(found).resolve().parent for found in [shutil.which("postgres")] if found]
    return next((path for path in [*debian, *on_path] if all((path / name).exists() for name in PROGRAMS)), None)


class Postgres:
    """A running server, in which every test takes a database of its own."""

    def __init__(self, port: int, password: str) -> None:
        self._port = port
        self._password = password

    def url(self, database: str) -> str:
        """The address of one of its databases."""
        address = URL.create("postgresql", "postgres", self._password, "127.0.0.1", self._port, database)
        return address.render_as_string(hide_password=False)

    def prepare(self) -> None:
        """Make the database that the others begin as, with all migrations done."""
        from serving.store.database import open_database  # late: it brings transformers along

        self._execute(f"CREATE DATABASE {_TEMPLATE}")
        open_database(self.url(_TEMPLATE)).dispose()

    @contextmanager
    def database(self, template: str = _TEMPLATE) -> Iterator[str]:
        """A copy of another database, to which nobody may be connected, or a migrated one without rows; its address."""
        name = f"test{next(_numbers)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield self.url(name)
        finally:
            self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return self._execute("SELECT 1")
            except OperationalError:
                assert process.poll() is None, "PostgreSQL ended at once"
                assert time.monotonic() < deadline, "PostgreSQL does not answer"
                time.sleep(0.05)

    def _execute(self, statement: str) -> None:
        url = self.url("postgres").replace("postgresql:", "postgresql+psycopg:", 1)
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.execute(text(statement))
        finally:
            engine.dispose()


@contextmanager
def running(programs: Path) -> Iterator[Postgres]:
    """Start a server and stop it with the block."""
    folder = Path(tempfile.mkdtemp(prefix="vblora-postgres-"))  # not below pytest's, which only its user may enter
    try:
        become = _another_user(folder)
        password, file = secrets.token_hex(16), folder / "password"
        file.write_text(password)
        file.chmod(0o644)
        data, port = folder / "data", _free_port()
        initdb: list[str | Path] = [
            programs / "initdb",
            "-D",
            data,
            "-U",
            "postgres",
            "-A",
            "scram-sha-256",
            f"--pwfile={file}",
        ]
        subprocess.run(
            [
                *become,
                *initdb,
                "--no-sync",
                "-E",
                "UTF8",
                "--locale=C.UTF-8",
                "--locale-provider=icu",
                "--icu-locale=en-US",
            ],
            check=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        options = [
            f"-c{option}" for option in ("listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", *_FAST)
        ]
        command: list[str | Path] = [*become, programs / "postgres", "-D", data, "-p", str(port), *options]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            server = Postgres(port, password)
            server.wait(process)
            server.prepare()
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # PostgreSQL's way to say: end, whoever is connected
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _another_user(folder: Path) -> list[str]:
    """What runs a program as a user that PostgreSQL accepts; gives that user `folder`."""
    if os.getuid() != 0:
        return []
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
