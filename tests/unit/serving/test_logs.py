from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from serving.logs import configure_logs


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root, access = logging.getLogger(), logging.getLogger("uvicorn.access")
    before = root.handlers[:], root.level, access.disabled
    yield
    root.handlers[:], root.level, access.disabled = before


def test_a_line_is_json_with_its_extra_fields() -> None:
    stream = io.StringIO()
    configure_logs("info", stream)
    logging.getLogger("serving.x").info("request", extra={"status": 200})
    logging.getLogger("serving.x").debug("too little")
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line)
    assert event.pop("timestamp")
    assert event == {"event": "request", "level": "info", "logger": "serving.x", "status": 200}


def test_a_traceback_stays_on_its_line() -> None:
    stream = io.StringIO()
    configure_logs("warning", stream)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("serving.x").exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: boom" in json.loads(line)["exception"]


def test_a_terminal_gets_words() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    configure_logs("info", stream)
    logging.getLogger("serving.x").info("request")
    assert "request" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_uvicorns_access_lines_are_dropped() -> None:
    stream = io.StringIO()
    configure_logs("info", stream)
    logging.getLogger("uvicorn.access").info("GET /?prompt=secret")
    assert stream.getvalue() == ""
