"""Routes that add, choose and remove adapters: `/v1/adapters…`, `/v1/set_adapter` and vLLM's two.

Knows neither files nor tensors: the catalog validates and stores, off the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, TypedDict, TypeVar

from fastapi import APIRouter, Depends, Request, Response, status
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import UploadFile

from serving.api.body import json_body
from serving.api.context import After, ApiContext, CallerOf, Context, Limit
from serving.api.openapi import UPLOAD_BODY, request_body
from serving.api.replies import AdapterEntry, AdapterList, DefaultReply, UploadReply
from serving.api.resolve import AdapterRef
from serving.api.schemas import ActivateBody, LoadAdapterBody, SetAdapterBody, UnloadAdapterBody
from serving.errors import InvalidValue
from serving.types import MAX_PAGE, Caller

router = APIRouter(tags=["adapters"])
T = TypeVar("T")


class Upload(TypedDict):
    """The parts of an upload."""

    name: str
    config: bytes
    weights: bytes
    bank: str | None


@router.get("/v1/adapters")
async def list_adapters(
    context: Context, caller: CallerOf, limit: Limit = MAX_PAGE, after: After = None
) -> AdapterList:
    """The caller's adapters and the shared ones, by name."""
    found = await context.threads.run(caller.tenant, context.catalog.list, caller.tenant, limit + 1, after)
    return AdapterList.of([AdapterEntry.of(info) for info in found], limit)


@router.get("/v1/adapters/{name}")
async def get_adapter(name: str, context: Context, caller: CallerOf) -> AdapterEntry:
    """One adapter with its revisions."""
    return AdapterEntry.of(await context.threads.run(caller.tenant, context.catalog.get, caller.tenant, name))


@router.post(
    "/v1/adapters",
    status_code=status.HTTP_201_CREATED,
    response_model=UploadReply,
    responses={200: {"model": UploadReply, "description": "This content was already stored; it is active now."}},
    openapi_extra=UPLOAD_BODY,
)
async def upload_adapter(request: Request, context: Context, caller: CallerOf) -> Response:
    """Validate, store and activate an adapter, which all tenants may use if an operator's key brings it."""
    upload = await _read_upload(request, context.caps.upload_bytes)
    shared = context.keyed and "operator" in caller.roles
    within = None
    if not shared:
        within = await context.threads.run(caller.tenant, context.quotas.adapter_quota, caller.tenant)
    add = partial(context.catalog.add, caller, **upload, shared=shared, within=within)
    info, revision, is_new = await _timed(context, caller, "upload", add)
    reply = UploadReply(
        name=info.name,
        revision=revision.revision,
        active_revision=info.active_revision,
        created=revision.created,
        bytes=revision.bytes,
    )
    return JSONResponse(reply.model_dump(), status.HTTP_201_CREATED if is_new else status.HTTP_200_OK)


@router.post("/v1/adapters/{name}/activate", openapi_extra=request_body(ActivateBody))
async def activate_adapter(
    name: str, body: Annotated[ActivateBody, Depends(json_body(ActivateBody))], context: Context, caller: CallerOf
) -> AdapterEntry:
    """Choose the revision that the bare name means."""
    return AdapterEntry.of(
        await context.threads.run(caller.tenant, context.catalog.activate, caller, name, body.revision)
    )


@router.delete("/v1/adapters/{name}", status_code=status.HTTP_204_NO_CONTENT)
async def delete_adapter(name: str, context: Context, caller: CallerOf) -> None:
    """Remove an adapter; requests that run on it finish."""
    await context.threads.run(caller.tenant, context.catalog.delete, caller, name)


@router.delete("/v1/adapters/{name}/revisions/{revision}", status_code=status.HTTP_204_NO_CONTENT)
async def delete_revision(name: str, revision: str, context: Context, caller: CallerOf) -> None:
    """Remove one revision that is not the active one; requests that run on it finish."""
    await context.threads.run(caller.tenant, context.catalog.delete_revision, caller, name, revision)


@router.post("/v1/set_adapter", openapi_extra=request_body(SetAdapterBody))
async def set_adapter(
    body: Annotated[SetAdapterBody, Depends(json_body(SetAdapterBody))], context: Context, caller: CallerOf
) -> DefaultReply:
    """Choose what answers requests that name only the base model."""

    def change() -> DefaultReply:
        ref = None if body.adapter is None else AdapterRef.parse(body.adapter)
        if ref is None:
            context.catalog.set_default(caller.tenant, None, caller=caller)
            return DefaultReply(adapter=None, revision=None)
        context.catalog.set_default(caller.tenant, ref.name, ref.revision, caller=caller)
        active = context.catalog.get(caller.tenant, ref.name).active_revision
        return DefaultReply(adapter=ref.name, revision=ref.revision or active)

    return await context.threads.run(caller.tenant, change)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, openapi_extra=request_body(LoadAdapterBody))
async def load_lora_adapter(
    body: Annotated[LoadAdapterBody, Depends(json_body(LoadAdapterBody))], context: Context, caller: CallerOf
) -> str:
    """Register a shared adapter from a folder of the server."""
    replace = bool(body.load_inplace)
    add = partial(context.catalog.add_from_path, body.lora_name, body.lora_path, replace=replace, caller=caller)
    await _timed(context, caller, "path", add)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, openapi_extra=request_body(UnloadAdapterBody))
async def unload_lora_adapter(
    body: Annotated[UnloadAdapterBody, Depends(json_body(UnloadAdapterBody))], context: Context, caller: CallerOf
) -> str:
    """Remove a shared adapter."""
    await context.threads.run(caller.tenant, partial(context.catalog.delete_shared, body.lora_name, caller=caller))
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


async def _read_upload(request: Request, limit: int) -> Upload:
    """The parts `name`, `config`, `weights` and, if it is there, `bank`; files may come as files or as plain fields."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidValue("the Content-Type must be multipart/form-data")
    async with request.form(max_files=2, max_fields=4, max_part_size=limit) as form:
        parts = {key: await _content(value) for key, value in form.multi_items()}
    for part in ("name", "config", "weights"):
        if part not in parts:
            raise InvalidValue(f"{part}: this part is missing", param=part)
    bank = parts["bank"].decode("utf-8", "replace") if "bank" in parts else None
    name = parts["name"].decode("utf-8", "replace")
    return Upload(name=name, config=parts["config"], weights=parts["weights"], bank=bank)


async def _content(part: UploadFile | str) -> bytes:
    return part.encode("utf-8", "surrogatepass") if isinstance(part, str) else await part.read()


async def _timed(context: ApiContext, caller: Caller, source: str, load: Callable[[], T]) -> T:
    started = time.perf_counter()
    result = await context.threads.run(caller.tenant, load)
    context.observer.on_adapter_loaded(source, time.perf_counter() - started)
    return result
