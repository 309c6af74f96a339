"""Everything about callers behind one object, for `serving/app.py`: made at start, closed at the end. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine

from serving.tenancy.authenticator import KeyAuthenticator, OpenAuthenticator
from serving.tenancy.directory import SqlTenantDirectory
from serving.tenancy.last_used import LastUsed
from serving.tenancy.records import Authenticator, TenantAdmin
from serving.tenancy.tenants import TenantRegistry
from serving.types import TenantDirectory


@dataclass(frozen=True, slots=True)
class Tenancy:
    """`keyed` is decided once, when the server starts."""

    keyed: bool
    authenticator: Authenticator
    tenants: TenantAdmin
    directory: TenantDirectory
    close: Callable[[], None]


def open_tenancy(engine: Engine) -> Tenancy:
    """Callers are whoever comes, each as the same tenant; tenants may be added, for the next start."""
    directory = SqlTenantDirectory(engine)
    tenants = TenantRegistry(engine, directory.forget)
    return Tenancy(False, OpenAuthenticator(), tenants, directory, lambda: None)


def keyed_tenancy(engine: Engine, verify_token: Callable[[str], str] | None = None) -> Tenancy:
    """Callers need a key of the registry, or a token that `verify_token` takes."""
    directory, last_used = SqlTenantDirectory(engine), LastUsed(engine)
    authenticator = KeyAuthenticator(directory, last_used, verify_token)

    def close() -> None:
        authenticator.close()
        last_used.close()

    return Tenancy(True, authenticator, TenantRegistry(engine, authenticator.forget), directory, close)
