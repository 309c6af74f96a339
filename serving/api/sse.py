"""Events of a generation → the bytes of a stream. After the first byte an error is a line of the stream."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi.sse import format_sse_event

from serving.api.context import RequestRecord
from serving.api.errors import error_body
from serving.api.formats import Format
from serving.api.rows import Rows
from serving.errors import InternalError, ServingError

MEDIA_TYPE = "text/event-stream"
_DONE = format_sse_event(data_str="[DONE]")
_logger = logging.getLogger("serving.api")


async def event_stream(rows: Rows, shape: Format, record: RequestRecord) -> AsyncIterator[bytes]:
    """Chunks, the usage if it was asked for, ``[DONE]``; or chunks and one error, after which nothing follows."""
    try:
        async for chunk in _chunks(rows, shape, record):
            yield _line(chunk)
        if shape.wants_usage:
            yield _line(shape.usage_chunk(record.usage))
        yield _DONE
    except ServingError as error:
        record.error_code = error.code
        yield _line(error_body(error))
    except Exception:
        _logger.exception("stream_failed", extra={"request_id": record.request_id})
        record.error_code = InternalError.code
        yield _line(error_body(InternalError("internal error")))


async def _chunks(rows: Rows, shape: Format, record: RequestRecord) -> AsyncIterator[dict[str, Any]]:
    started: set[int] = set()
    async for index, event in rows.events():
        record.count(event)
        if event.text or event.finish_reason is not None:
            yield shape.chunk(index, event.text, event.finish_reason, first=index not in started)
            started.add(index)


def _line(data: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(data, ensure_ascii=False, separators=(",", ":")))
