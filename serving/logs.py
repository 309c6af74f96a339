"""Logs: one line an event on standard error, for people on a terminal and JSON elsewhere. Never a prompt or a key.

Code logs through the standard library; `extra` fields become fields of the line.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog

LEVELS = ("debug", "info", "warning", "error")


def configure_logs(level: str, stream: TextIO = sys.stderr) -> None:
    """Send everything from `level` up to `stream`. uvicorn's own access lines are dropped: the server writes better
    ones."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        _drop_uvicorn_colours,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(stream)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True
    for chatty in ("alembic", "httpx", "httpcore", "transformers", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _drop_uvicorn_colours(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event.pop("color_message", None)
    return event


def _rendering(stream: TextIO) -> list[structlog.typing.Processor]:
    if stream.isatty():
        return [structlog.dev.ConsoleRenderer()]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
