"""A running server that asks for keys, with those of an operator and of a tenant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from serving.store.database import open_database, sqlite_url
from serving.tenancy.tenants import TenantRegistry
from serving.types import Caller, Role
from tests.integration.api.conftest import Files, Server, running

TENANTS: dict[str, Role] = {"ops": "operator", "acme": "tenant"}


@dataclass(frozen=True)
class Keyed:
    """The server and a key of each tenant, by name."""

    server: Server
    keys: dict[str, str]

    def client(self, name: str | None) -> httpx.Client:
        """A client with the key of a tenant, or with none."""
        headers = {"Authorization": f"Bearer {self.keys[name]}"} if name else {}
        return httpx.Client(base_url=self.server.url, headers=headers, timeout=60)


def add_tenants(data_dir: Path) -> dict[str, str]:
    """Make `TENANTS` in the registry of a server; their keys by name."""
    database = open_database(sqlite_url(data_dir / "registry.db"))
    registry = TenantRegistry(database)
    caller = Caller("test", frozenset({"operator"}))
    keys = {name: registry.add(caller, name, role)[1].secret for name, role in TENANTS.items()}
    database.dispose()
    return keys


@contextmanager
def keyed(files: Files, data_dir: Path, **settings: Any) -> Iterator[Keyed]:
    keys = add_tenants(data_dir)
    with running(files, data_dir, **settings) as server:
        yield Keyed(server, keys)
