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


async def event_stream(lines: AsyncIterator[bytes], record: RequestRecord) -> AsyncIterator[bytes]:
    """`lines` to their end; or lines and one error, after which nothing follows."""
    try:
        async for line in lines:
            yield line
    except ServingError as error:
        record.fail(error)
        yield event_line(error_body(error))
    except Exception:
        _logger.exception("stream_failed", extra={"request_id": record.request_id})
        record.error_code = InternalError.code
        yield event_line(error_body(InternalError("internal error")))


async def chunk_lines(rows: Rows, shape: Format[Any], record: RequestRecord) -> AsyncIterator[bytes]:
    """Chunks, the usage if it was asked for, ``[DONE]``."""
    async for index, event in rows.events():
        record.count(event)
        if chunk := shape.take(index, event):
            yield event_line(chunk)
    if shape.wants_usage:
        yield event_line(shape.usage_chunk(record.usage))
    yield _DONE


def event_line(data: dict[str, Any], name: str | None = None) -> bytes:
    """One event of a stream, with its `name` where the client goes by names."""
    return format_sse_event(data_str=json.dumps(data, ensure_ascii=False, separators=(",", ":")), event=name)
