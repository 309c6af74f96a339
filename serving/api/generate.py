"""`POST /v1/completions` and `POST /v1/chat/completions`.

A request is parsed, tokenised, resolved and admitted before the first byte of its answer. What it holds, the pin and
the engine's rows, is let go when the answer is out, the client is gone, or anything failed.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from serving.api.body import json_body
from serving.api.choices import chat_choices, completion_choices
from serving.api.compiling import compile_structures
from serving.api.context import ApiContext, CallerOf, Context, Record, RequestRecord, UntilAnswered
from serving.api.formats import ChatFormat, CompletionFormat, Format
from serving.api.openapi import request_body
from serving.api.prepare import Prepared, prepare_chat, prepare_completion
from serving.api.replies import ChatReply, CompletionReply
from serving.api.resolve import BASE, shown_name
from serving.api.rows import Rows, unless_disconnected
from serving.api.schemas import ChatBody, CompletionBody, GenerationBody
from serving.api.sse import MEDIA_TYPE, chunk_lines, event_stream
from serving.tenancy.metering import Allowance, UsageCounts
from serving.types import Caller

ADAPTER_HEADER = "X-VBLoRA-Adapter"
router = APIRouter(tags=["generation"])


@router.post("/v1/completions", response_model=CompletionReply, openapi_extra=request_body(CompletionBody))
async def create_completion(
    request: Request,
    body: Annotated[CompletionBody, Depends(json_body(CompletionBody))],
    context: Context,
    caller: CallerOf,
    record: Record,
    stack: UntilAnswered,
) -> Response:
    """Continue one or more prompts; each prompt is a choice of its own."""
    await compile_structures(context, caller, body)
    prepared = await context.threads.run(caller.tenant, prepare_completion, context, caller, body)
    rows = await admit(context, caller, record, prepared, stack)
    choices = completion_choices(prepared, context.codec, body)
    return await _answer(request, body, rows, CompletionFormat(*_head(body, record), choices), record)


@router.post("/v1/chat/completions", response_model=ChatReply, openapi_extra=request_body(ChatBody))
async def create_chat_completion(
    request: Request,
    body: Annotated[ChatBody, Depends(json_body(ChatBody))],
    context: Context,
    caller: CallerOf,
    record: Record,
    stack: UntilAnswered,
) -> Response:
    """Answer the last message of a chat."""
    await compile_structures(context, caller, body)
    prepared = await context.threads.run(caller.tenant, prepare_chat, context, caller, body)
    rows = await admit(context, caller, record, prepared, stack)
    choices = chat_choices(prepared, context.codec, body)
    return await _answer(request, body, rows, ChatFormat(*_head(body, record), choices), record)


async def admit(
    context: ApiContext, caller: Caller, record: RequestRecord, prepared: Prepared, stack: ExitStack
) -> Rows:
    """Charge the tenant's quotas and hand the rows to the engine; `stack` ends them, settles what was used and then
    releases the pin."""
    if prepared.pin is not None:
        stack.callback(prepared.pin.release)
    record.adapter = shown_name(prepared.pin)
    record.prompt_tokens = prepared.prompt_tokens
    allowance = context.quotas.allowance(caller.tenant)
    stack.callback(_settle, context, caller, record, allowance)
    try:
        await context.threads.run(caller.tenant, allowance.take, prepared.most_tokens, prepared.limit_param)
    finally:
        record.headers.update(allowance.headers)
    rows = stack.enter_context(Rows(context.engine))
    rows.submit(caller.tenant, prepared, allowance.limits)
    record.admitted = True
    stack.enter_context(context.lifecycle.generation(rows.end))
    return rows


def _settle(context: ApiContext, caller: Caller, record: RequestRecord, allowance: Allowance) -> None:
    """The request has ended, however it did; one that was refused counts for nothing."""
    if not record.admitted:
        allowance.close(None)
        return
    allowance.close(record.prompt_tokens + record.generated_tokens)
    adapter = "" if record.adapter == BASE else record.adapter or ""
    context.usage.add(
        caller.tenant, adapter, UsageCounts(1, record.prompt_tokens, record.cached_tokens, record.generated_tokens)
    )


def _head(body: GenerationBody, record: RequestRecord) -> tuple[str, str, int, bool]:
    return body.request_id or record.request_id, body.model, int(time.time()), body.wants_usage


async def _answer(
    request: Request, body: GenerationBody, rows: Rows, shape: Format[Any], record: RequestRecord
) -> Response:
    headers = {ADAPTER_HEADER: record.adapter or ""}
    if body.stream:
        headers["Cache-Control"] = "no-cache"
        lines = chunk_lines(rows, shape, record)
        return StreamingResponse(event_stream(lines, record), media_type=MEDIA_TYPE, headers=headers)
    await unless_disconnected(request, _collect(rows, shape, record))
    return JSONResponse(shape.reply(record.usage).model_dump(), headers=headers)


async def _collect(rows: Rows, shape: Format[Any], record: RequestRecord) -> None:
    async for index, event in rows.events():
        record.count(event)
        shape.take(index, event)
