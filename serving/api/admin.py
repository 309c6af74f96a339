"""`/admin/tenants…` and `/admin/audit`: operators manage tenants, their keys and limits. Knows no database."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Response, status

from serving.api.admin_schemas import (
    AuditList,
    ChangeTenantBody,
    CreateTenantBody,
    KeyList,
    NewKeyEntry,
    NewTenantEntry,
    TenantEntry,
    TenantList,
)
from serving.api.body import json_body
from serving.api.context import ApiContext, CallerOf, Context
from serving.api.openapi import request_body
from serving.api.values import INT64
from serving.tenancy.records import TenantChange
from serving.types import Caller

router = APIRouter(prefix="/admin", tags=["tenants"])
Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str | None, Query(max_length=64)]
_ONCE = {"Cache-Control": "no-store"}  # of answers with a key in them


@router.get("/tenants")
async def list_tenants(context: Context, limit: Limit = 100, after: After = None) -> TenantList:
    """The tenants by name."""
    return TenantList.of(await to_thread.run_sync(context.tenants.tenants, limit + 1, after), limit)


@router.post("/tenants", status_code=status.HTTP_201_CREATED, openapi_extra=request_body(CreateTenantBody))
async def create_tenant(
    body: Annotated[CreateTenantBody, Depends(json_body(CreateTenantBody))],
    context: Context,
    caller: CallerOf,
    response: Response,
) -> NewTenantEntry:
    """Add a tenant with a first key, which is shown this once."""
    add = partial(context.tenants.add, weight=body.weight or 1.0, quotas=body.limits())
    tenant, issued = await to_thread.run_sync(add, caller, body.name, body.role)
    response.headers.update(_ONCE)
    return NewTenantEntry(**TenantEntry.of(tenant).model_dump(), key=NewKeyEntry.issued(issued))


@router.get("/tenants/{name}")
async def get_tenant(name: str, context: Context) -> TenantEntry:
    """One tenant."""
    return TenantEntry.of(await to_thread.run_sync(context.tenants.get, name))


@router.patch("/tenants/{name}", openapi_extra=request_body(ChangeTenantBody))
async def change_tenant(
    name: str,
    body: Annotated[ChangeTenantBody, Depends(json_body(ChangeTenantBody))],
    context: Context,
    caller: CallerOf,
) -> TenantEntry:
    """Disable or enable a tenant, change its weight or its quotas."""
    return TenantEntry.of(await to_thread.run_sync(context.tenants.change, caller, name, body.change()))


@router.delete("/tenants/{name}", status_code=status.HTTP_204_NO_CONTENT)
async def delete_tenant(name: str, context: Context, caller: CallerOf) -> None:
    """Remove a tenant with its keys and adapters; its usage stays on record."""
    await to_thread.run_sync(_delete, context, caller, name)


@router.get("/tenants/{name}/keys")
async def list_keys(name: str, context: Context, limit: Limit = 100, after: After = None) -> KeyList:
    """The keys of a tenant by id, revoked ones too; of each only its first characters."""
    return KeyList.of(await to_thread.run_sync(context.tenants.keys, name, limit + 1, after), limit)


@router.post("/tenants/{name}/keys", status_code=status.HTTP_201_CREATED)
async def create_key(name: str, context: Context, caller: CallerOf, response: Response) -> NewKeyEntry:
    """Add a key, which is shown this once."""
    issued = await to_thread.run_sync(context.tenants.add_key, caller, name)
    response.headers.update(_ONCE)
    return NewKeyEntry.issued(issued)


@router.delete("/tenants/{name}/keys/{id}", status_code=status.HTTP_204_NO_CONTENT)
async def revoke_key(name: str, id: str, context: Context, caller: CallerOf) -> None:
    """Make a key worthless, at once."""
    await to_thread.run_sync(context.tenants.revoke_key, caller, name, id)


@router.get("/audit")
async def list_changes(
    context: Context, limit: Limit = 100, after: Annotated[int | None, Query(ge=1, lt=INT64)] = None
) -> AuditList:
    """Every change to tenants, keys and adapters: who, what, when, from where. Newest first."""
    return AuditList.of(await to_thread.run_sync(context.tenants.audit, limit + 1, after), limit)


def _delete(context: ApiContext, caller: Caller, name: str) -> None:
    """Nobody may call as the tenant while its adapters go; what ends half-way can be asked for again."""
    context.tenants.change(caller, name, TenantChange(disabled=True))
    context.catalog.forget(caller, name)
    context.tenants.delete(caller, name)
