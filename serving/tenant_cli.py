"""`vblora-serve tenant …`: tenants and keys, straight in the registry's database, beside a server or without one.

A key goes to standard output, alone, so that a script can take it; whatever is said of it goes to standard error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from serving.errors import ServingError
from serving.settings import ENV_PREFIX, default_data_dir
from serving.store.database import DatabaseError, open_database, sqlite_url
from serving.tenancy.records import Tenant, TenantChange
from serving.tenancy.tenants import TenantRegistry
from serving.types import Caller

FAILED = 1
PAGE = 500
CALLER = Caller("command line", frozenset({"operator"}))
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", envvar=f"{ENV_PREFIX}DATA_DIR", help="The server's.", show_default="the user's data folder"
    ),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database-url",
        envvar=f"{ENV_PREFIX}DATABASE_URL",
        help="The server's, if it has one.",
        show_default="a file in data-dir",
    ),
]


class Role(Enum):
    tenant = "tenant"
    operator = "operator"


tenant_app = typer.Typer(help="Manage tenants and their keys, in the registry's database.", no_args_is_help=True)


@tenant_app.command("add")
def add_tenant(
    name: str,
    role: Annotated[Role, typer.Option(help="An operator may use every route.")] = Role.tenant,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Add NAME and print its first key, which is shown this once."""
    with _registry(data_dir, database_url) as registry:
        first = not registry
        _, issued = registry.add(CALLER, name, role.value)
    _say(f"tenant {name} added, role {role.value}; its key, shown this once:")
    typer.echo(issued.secret)
    if first:
        _say("this is the first tenant: a server that runs now goes on without keys until it is restarted")


@tenant_app.command("list")
def list_tenants(data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """One line a tenant: its name, its role, whether it is disabled, and what limits it."""
    with _registry(data_dir, database_url) as registry:
        after = None
        while page := registry.tenants(PAGE, after):
            after = page[-1].name
            for tenant in page:
                typer.echo(_line(tenant))


@tenant_app.command("disable")
def disable_tenant(name: str, data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Refuse all keys of NAME, within a second on a running server."""
    with _registry(data_dir, database_url) as registry:
        registry.change(CALLER, name, TenantChange(disabled=True))
    _say(f"tenant {name} disabled")


@tenant_app.command("enable")
def enable_tenant(name: str, data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Take the keys of NAME again."""
    with _registry(data_dir, database_url) as registry:
        registry.change(CALLER, name, TenantChange(disabled=False))
    _say(f"tenant {name} enabled")


@tenant_app.command("rotate-key")
def rotate_key(name: str, data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Revoke all keys of NAME at once and print a new one, which is shown this once."""
    with _registry(data_dir, database_url) as registry:
        issued = registry.rotate_key(CALLER, name)
    _say(f"all keys of tenant {name} revoked; its new key, shown this once:")
    typer.echo(issued.secret)


@contextmanager
def _registry(data_dir: Path | None, database_url: str | None) -> Iterator[TenantRegistry]:
    try:
        engine = open_database(database_url or sqlite_url((data_dir or default_data_dir()) / "registry.db"))
        try:
            yield TenantRegistry(engine)
        finally:
            engine.dispose()
    except DatabaseError as error:
        _fail(str(error))
    except ServingError as error:
        _fail(error.message)


def _line(tenant: Tenant) -> str:
    marks = ["disabled"] * tenant.disabled + [f"{name}={value}" for name, value in tenant.quotas.items()]
    return "  ".join([tenant.name, tenant.role, f"weight={tenant.weight:g}", *marks])


def _say(message: str) -> None:
    typer.echo(f"vblora-serve: {message}", err=True)


def _fail(message: str) -> NoReturn:
    _say(message)
    raise typer.Exit(FAILED)
