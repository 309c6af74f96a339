"""Bytes of a JSON body → a validated request model, or one `InvalidValue` that names the field.

Knows no routes. Stricter than `json`: no NaN or Infinity, no lone surrogates, one object at the top.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import ValidationError

from serving.api.errors import validation_error
from serving.api.fields import RequestModel, check_fields
from serving.errors import InvalidValue

_WHOLE = re.compile(r"-?[0-9]{1,18}\.0+")
T = TypeVar("T", bound=RequestModel)


def json_body(model: type[T]) -> Callable[[Request], Awaitable[T]]:
    """A dependency that reads the body as a `model`."""

    async def read(request: Request) -> T:
        _require_json(request)
        return parse_body(model, await request.body(), context=request.app.state.context.caps)

    return read


def parse_body(model: type[T], raw: bytes, *, context: object) -> T:
    """`raw` as a `model`, whose validators see `context`. Raises `InvalidValue`."""
    data = parse_json(raw)
    check_fields(model, data)
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False)) from error


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises `InvalidValue` for anything else."""
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_number)
        surrogate = next(_lone_surrogates(data, ()), None) if b"\\u" in raw else None
    except UnicodeDecodeError as error:
        raise InvalidValue("the body is not UTF-8") from error
    except RecursionError as error:
        raise InvalidValue("the body is nested too deeply") from error
    except ValueError as error:
        raise InvalidValue(f"the body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InvalidValue("the body must be a JSON object")
    if surrogate is not None:
        param = ".".join(surrogate).encode("utf-8", "replace").decode()
        raise InvalidValue(f"{param}: contains a lone surrogate, which no text may", param=param)
    return data


def _require_json(request: Request) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise InvalidValue("the Content-Type must be application/json")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _number(text: str) -> int | float:
    """``8.0`` is an integer in JSON."""
    return int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else float(text)


def _lone_surrogates(value: object, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _lone_surrogates(key, (*path, key))
            yield from _lone_surrogates(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _lone_surrogates(item, (*path, str(index)))
