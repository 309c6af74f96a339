"""`GET /admin/usage`: tokens by day, tenant and adapter, for operators, as JSON or CSV. Knows no database."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import date
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from serving.api.context import Context
from serving.errors import InvalidValue
from serving.tenancy.metering import UsageCounts, UsageFilter, UsageKey

router = APIRouter(prefix="/admin", tags=["tenants"])
CSV = "text/csv"


class UsageEntry(BaseModel):
    """What one tenant used of one adapter, `name@revision` or empty for the base model, on one day of UTC."""

    object: Literal["usage"] = "usage"
    id: str
    day: date
    tenant: str
    adapter: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int

    @classmethod
    def of(cls, key: UsageKey, counts: UsageCounts) -> UsageEntry:
        return cls(
            id=f"{key.day}/{key.tenant}/{key.adapter}",
            day=key.day,
            tenant=key.tenant,
            adapter=key.adapter,
            requests=counts.requests,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            generated_tokens=counts.generated_tokens,
        )


class UsageList(BaseModel):
    """A part of a list: the next one is that `after` its `last_id`."""

    object: Literal["list"] = "list"
    data: list[UsageEntry]
    has_more: bool
    first_id: str | None
    last_id: str | None


@router.get(
    "/usage",
    response_model=UsageList,
    responses={200: {"content": {CSV: {"schema": {"type": "string"}}}}},
)
async def list_usage(
    context: Context,
    tenant: Annotated[str | None, Query(max_length=64)] = None,
    adapter: Annotated[str | None, Query(max_length=160)] = None,
    first: Annotated[date | None, Query(alias="from")] = None,
    last: Annotated[date | None, Query(alias="to")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=256)] = None,
    format: Literal["json", "csv"] = "json",
) -> Response:
    """Requests and tokens by day, tenant and adapter, up to this moment.

    Where a CSV is not all, the header `X-Last-Id` names its last entry.
    """
    wanted = UsageFilter(tenant, adapter, first, last)
    start = None if after is None else _key(after)
    found = await to_thread.run_sync(context.usage.find, wanted, limit + 1, start)
    entries = [UsageEntry.of(key, counts) for key, counts in found[:limit]]
    page = UsageList(
        data=entries,
        has_more=len(found) > limit,
        first_id=entries[0].id if entries else None,
        last_id=entries[-1].id if entries else None,
    )
    if format == "json":
        return JSONResponse(page.model_dump(mode="json"))
    more = {"X-Last-Id": entries[-1].id} if page.has_more else {}
    return Response(_csv(entries), media_type=f"{CSV}; charset=utf-8", headers=more)


def _key(text: str) -> UsageKey:
    """The key behind an entry's id."""
    try:
        day, tenant, adapter = text.split("/")
        return UsageKey(date.fromisoformat(day), tenant, adapter)
    except ValueError as error:
        raise InvalidValue("after: this is not the id of an entry", param="after") from error


def _csv(entries: Sequence[UsageEntry]) -> str:
    columns = [name for name in UsageEntry.model_fields if name not in ("object", "id")]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([getattr(entry, name) for name in columns] for entry in entries)
    return text.getvalue()
