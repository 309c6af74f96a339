"""`POST /v1/responses`: OpenAI's newer route, as far as it needs no memory of the server's. Knows no engine.

Supported are `input`, `instructions`, `text.format`, `max_output_tokens`, `stream` and what decides how tokens are
chosen; nothing is stored, so there is nothing to refer to.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from serving.api.body import json_body
from serving.api.compiling import compile_structures
from serving.api.context import ApiContext, CallerOf, Context, Record, RequestRecord, UntilAnswered
from serving.api.generate import ADAPTER_HEADER, admit
from serving.api.openapi import request_body
from serving.api.prepare import Prepared, Row, base_sampling, fit, longest_answer
from serving.api.resolve import pin_adapter
from serving.api.response_schemas import OutputMessage, OutputText, ResponseBody, ResponseReply, ResponseUsage
from serving.api.rows import Rows, unless_disconnected
from serving.api.sampling import or_default
from serving.api.sse import MEDIA_TYPE, event_line, event_stream
from serving.errors import InvalidValue
from serving.types import Caller

router = APIRouter(tags=["generation"])


@router.post("/v1/responses", response_model=ResponseReply, openapi_extra=request_body(ResponseBody))
async def create_response(
    request: Request,
    body: Annotated[ResponseBody, Depends(json_body(ResponseBody))],
    context: Context,
    caller: CallerOf,
    record: Record,
    stack: UntilAnswered,
) -> Response:
    """Answer a text or the last message of a chat. Nothing is stored."""
    await compile_structures(context, caller, body)
    prepared = await context.threads.run(caller.tenant, _prepare, context, caller, body)
    rows = await admit(context, caller, record, prepared, stack)
    answer = Answer(body, record)
    headers = {ADAPTER_HEADER: record.adapter or ""}
    if body.stream:
        headers["Cache-Control"] = "no-cache"
        lines = event_stream(answer.lines(rows), record)
        return StreamingResponse(lines, media_type=MEDIA_TYPE, headers=headers)
    await unless_disconnected(request, answer.collect(rows))
    return JSONResponse(answer.reply().model_dump(), headers=headers)


def _prepare(context: ApiContext, caller: Caller, body: ResponseBody) -> Prepared:
    tokens = context.codec.encode_chat(body.messages())
    tokens = tokens[-or_default(body.truncate_prompt_tokens, 0) :]
    most, context_length = longest_answer(context, caller, len(tokens), 1), context.card.max_model_len
    most.check(body.max_output_tokens or 0, "max_output_tokens")
    default = min(context_length, most.default or context_length)
    length = fit(context.card, len(tokens), body.max_output_tokens, "input", default)
    if or_default(body.min_tokens, 0) > length:
        raise InvalidValue(f"min_tokens is {body.min_tokens}, above max_output_tokens = {length}", param="min_tokens")
    params = base_sampling(context, body, max_tokens=length)
    pin = pin_adapter(context.catalog, caller.tenant, context.card.base_id, body.model, body.adapter_id)
    return Prepared(
        (Row(tuple(tokens), params),), pin, body.cache_salt, or_default(body.priority, 0), "max_output_tokens"
    )


class Answer:
    """One response as it takes shape: whole, or as the events of a stream."""

    def __init__(self, body: ResponseBody, record: RequestRecord) -> None:
        self._body = body
        self._record = record
        self._created = int(time.time())
        self._id = body.request_id or record.request_id
        self._text = ""
        self._finish: str | None = None
        self._events = 0

    async def collect(self, rows: Rows) -> None:
        """Take all events."""
        async for _ in self._deltas(rows):
            pass

    async def _deltas(self, rows: Rows) -> AsyncIterator[str]:
        async for _, event in rows.events():
            self._record.count(event)
            self._text += event.text
            self._finish = event.finish_reason
            if event.text:
                yield event.text

    async def lines(self, rows: Rows) -> AsyncIterator[bytes]:
        """The events of a stream, in OpenAI's order."""
        place = {"item_id": f"msg_{self._id}", "output_index": 0, "content_index": 0}
        empty = OutputText(text="").model_dump()
        yield self._line("created", response=self.reply().model_dump())
        yield self._line("in_progress", response=self.reply().model_dump())
        yield self._line("output_item.added", output_index=0, item={**self._message().model_dump(), "content": []})
        yield self._line("content_part.added", **place, part=empty)
        async for delta in self._deltas(rows):
            yield self._line("output_text.delta", **place, delta=delta, logprobs=[])
        yield self._line("output_text.done", **place, text=self._text, logprobs=[])
        yield self._line("content_part.done", **place, part=OutputText(text=self._text).model_dump())
        yield self._line("output_item.done", output_index=0, item=self._message().model_dump())
        yield self._line(self._status, response=self.reply().model_dump())

    def _line(self, name: str, **fields: Any) -> bytes:
        number, self._events = self._events, self._events + 1
        kind = f"response.{name}"
        return event_line({"type": kind, "sequence_number": number, **fields}, kind)

    @property
    def _status(self) -> str:
        return {None: "in_progress", "length": "incomplete"}.get(self._finish, "completed")

    def _message(self) -> OutputMessage:
        return OutputMessage(id=f"msg_{self._id}", status=self._status, content=[OutputText(text=self._text)])

    def reply(self) -> ResponseReply:
        """The response as of now."""
        body, usage = self._body, self._record.usage
        ended = self._finish is not None
        return ResponseReply(
            id=f"resp_{self._id}",
            created_at=self._created,
            status=self._status,
            incomplete_details={"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=body.model,
            output=[self._message()] if ended else [],
            temperature=or_default(body.temperature, 1.0),
            top_p=or_default(body.top_p, 1.0),
            text=json.loads(body.text.model_dump_json(by_alias=True)) if body.text else {"format": {"type": "text"}},
            usage=ResponseUsage.of(usage) if ended else None,
        )
