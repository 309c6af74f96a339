"""The vocabulary of tenants and keys: plain messages, and the Protocols through which the API asks for them.

Knows no database and no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

from serving.types import Caller, Role, TenantLimits

DEFAULT_TENANT = "default"  # everybody, on a server without keys
QUOTAS = tuple(entry.name for entry in fields(TenantLimits) if entry.name != "weight")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who may call. `quotas` holds the limits that differ from the server's defaults, by their names in `QUOTAS`."""

    name: str
    role: Role
    disabled: bool
    weight: float
    quotas: Mapping[str, int]
    created: int

    @property
    def roles(self) -> frozenset[Role]:
        """An operator may do what a tenant may."""
        return frozenset({"tenant", self.role})

    @property
    def limits(self) -> TenantLimits:
        known = {name: value for name, value in self.quotas.items() if name in QUOTAS}
        return TenantLimits(**known, weight=self.weight)


@dataclass(frozen=True, slots=True)
class TenantChange:
    """What to change; None and what `quotas` does not name stay. A quota of None is the server's default again."""

    disabled: bool | None = None
    weight: float | None = None
    quotas: Mapping[str, int | None] = field(default_factory=dict)

    def __str__(self) -> str:
        given = {"disabled": self.disabled, "weight": self.weight}
        parts = [f"{name}={value}" for name, value in given.items() if value is not None]
        return " ".join([*parts, *(f"{name}={value}" for name, value in self.quotas.items())])


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept. `prefix` are its first characters; times are seconds since the epoch."""

    id: str
    prefix: str
    created: int
    last_used: int | None = None
    revoked: int | None = None


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key just made, with the `secret` that nobody can see again."""

    key: Key
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change: when, who, from where, what, of whom, to what."""

    id: int
    at: float
    actor: str
    address: str
    action: str
    tenant: str
    subject: str


class Authenticator(Protocol):
    """Decides who a caller is, from the ``Authorization`` header alone. On the event loop only."""

    async def authenticate(self, authorization: str | None) -> Caller:
        """The caller. Raises `InvalidApiKey` when the credentials are missing, wrong or disabled, `Unavailable` when
        nobody can tell."""


class TenantAdmin(Protocol):
    """Tenants and their keys. Calls use a database: run them off the event loop.

    Errors are `serving.errors`: `NotFound` for a tenant or key that is not there, `InvalidValue` for a name that
    cannot be given and for a change that would leave no operator. Lists hold at most `limit` entries, those that follow
    `after`. Every change is in the audit log.
    """

    def tenants(self, limit: int, after: str | None = None) -> Sequence[Tenant]:
        """By name."""

    def get(self, name: str) -> Tenant: ...
    def add(
        self, caller: Caller, name: str, role: Role, *, weight: float = 1.0, quotas: Mapping[str, int] | None = None
    ) -> tuple[Tenant, IssuedKey]: ...
    def change(self, caller: Caller, name: str, change: TenantChange) -> Tenant: ...
    def delete(self, caller: Caller, name: str) -> None: ...
    def keys(self, name: str, limit: int, after: str | None = None) -> Sequence[Key]:
        """By id, revoked ones too."""

    def add_key(self, caller: Caller, name: str) -> IssuedKey: ...
    def rotate_key(self, caller: Caller, name: str) -> IssuedKey:
        """Revoke all keys of a tenant and make a new one."""

    def revoke_key(self, caller: Caller, name: str, key_id: str) -> None: ...
    def audit(self, limit: int, after: int | None = None) -> Sequence[AuditEntry]:
        """Newest first; `after` is the id of the last one seen."""
