"""Bodies and replies of `/admin`. Knows no database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypedDict

from pydantic import BaseModel, Field

from serving.api.operations import NAME_SCHEMA
from serving.api.structures import Exact
from serving.api.values import INT64
from serving.tenancy.records import QUOTAS, AuditEntry, IssuedKey, Key, Tenant, TenantChange
from serving.types import Role

TenantName = Annotated[str, Field(json_schema_extra=NAME_SCHEMA)]
Weight = Annotated[float, Field(gt=0, le=1000, description="Share of the tokens beside other tenants'; 1 at first.")]
Quota = Annotated[int, Field(ge=0, lt=INT64)] | None


class Quotas(Exact):
    """Limits of one tenant; null is the server's default."""

    requests_per_minute: Quota = None
    tokens_per_minute: Quota = None
    concurrent_requests: Quota = None
    queued_requests: Quota = None
    max_tokens: Quota = None
    adapters: Quota = None
    adapter_bytes: Quota = None

    def given(self) -> dict[str, int | None]:
        """Those that the body names."""
        return {name: getattr(self, name) for name in QUOTAS if name in self.model_fields_set}


class CreateTenantBody(Exact):
    """A tenant, with the limits that differ from the server's."""

    name: TenantName
    role: Role = Field("tenant", description="An operator may use every route, and a tenant's too.")
    weight: Weight | None = None
    quotas: Quotas | None = None

    def limits(self) -> dict[str, int]:
        """The quotas that are set."""
        given = self.quotas.given() if self.quotas else {}
        return {name: value for name, value in given.items() if value is not None}


class ChangeTenantBody(Exact):
    """What to change; what is null or missing stays, but for a quota of null, which is the server's again."""

    disabled: bool | None = None
    weight: Weight | None = None
    quotas: Quotas | None = None

    def change(self) -> TenantChange:
        return TenantChange(self.disabled, self.weight, self.quotas.given() if self.quotas else {})


class TenantEntry(BaseModel):
    object: Literal["tenant"] = "tenant"
    name: str
    role: Role
    disabled: bool
    weight: float
    quotas: dict[str, int | None]
    created: int

    @classmethod
    def of(cls, tenant: Tenant) -> TenantEntry:
        return cls(
            name=tenant.name,
            role=tenant.role,
            disabled=tenant.disabled,
            weight=tenant.weight,
            quotas={name: tenant.quotas.get(name) for name in QUOTAS},
            created=tenant.created,
        )


class KeyEntry(BaseModel):
    """A key as it is kept; `prefix` are its first characters."""

    object: Literal["key"] = "key"
    id: str
    prefix: str
    created: int
    last_used: int | None
    revoked: int | None

    @classmethod
    def of(cls, key: Key) -> KeyEntry:
        return cls(id=key.id, prefix=key.prefix, created=key.created, last_used=key.last_used, revoked=key.revoked)


class NewKeyEntry(KeyEntry):
    """A key just made. `key` is shown this once."""

    key: str

    @classmethod
    def issued(cls, issued: IssuedKey) -> NewKeyEntry:
        return cls(**KeyEntry.of(issued.key).model_dump(), key=issued.secret)


class NewTenantEntry(TenantEntry):
    """A tenant just made, with its first key."""

    key: NewKeyEntry


class AuditRow(BaseModel):
    """One change: `actor` did `action` to `subject` of `tenant`, calling from `address`."""

    id: int
    at: float
    actor: str
    address: str
    action: str
    tenant: str
    subject: str

    @classmethod
    def of(cls, entry: AuditEntry) -> AuditRow:
        return cls(
            id=entry.id,
            at=entry.at,
            actor=entry.actor,
            address=entry.address,
            action=entry.action,
            tenant=entry.tenant,
            subject=entry.subject,
        )


class Page(BaseModel):
    """A part of a list: the next one is that `after` its `last_id`."""

    object: Literal["list"] = "list"
    has_more: bool
    first_id: str | None
    last_id: str | None


class _Ends(TypedDict):
    has_more: bool
    first_id: str | None
    last_id: str | None


class TenantList(Page):
    data: list[TenantEntry]

    @classmethod
    def of(cls, found: Sequence[Tenant], limit: int) -> TenantList:
        return cls(data=[TenantEntry.of(tenant) for tenant in found[:limit]], **_ends([t.name for t in found], limit))


class KeyList(Page):
    data: list[KeyEntry]

    @classmethod
    def of(cls, found: Sequence[Key], limit: int) -> KeyList:
        return cls(data=[KeyEntry.of(key) for key in found[:limit]], **_ends([key.id for key in found], limit))


class AuditList(Page):
    """Newest first."""

    data: list[AuditRow]

    @classmethod
    def of(cls, found: Sequence[AuditEntry], limit: int) -> AuditList:
        return cls(data=[AuditRow.of(e) for e in found[:limit]], **_ends([str(e.id) for e in found], limit))


def _ends(ids: list[str], limit: int) -> _Ends:
    """Of up to one entry more than the `limit`."""
    page = ids[:limit]
    return {"has_more": len(ids) > limit, "first_id": page[0] if page else None, "last_id": page[-1] if page else None}
