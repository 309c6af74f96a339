"""Random JSON schemas for tests of structured answers, of what the server can compile.

All that a random model could go on with for ever is bounded: strings, arrays, the depth of nesting, and no object takes
properties it does not name. `oneOf`, `not` and dependencies are left out, and so is what llguidance does not know.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
WORDS = ("id", "name", "tags", "größe", "a b", "x-y", "value", "when")
PATTERNS = ("^[a-f]{2,6}$", "^(on|off)$", r"^\d{1,4}-[A-Z]$", "^x*y{1,3}$")
FORMATS = ("date", "time", "date-time", "ipv4", "uuid")
DEPTH = 3


def random_schema(seed: int) -> Schema:
    """A schema that depends on `seed` alone; about every third refers to definitions of its own."""
    source = random.Random(seed)
    schema = _any(source, DEPTH)
    if source.random() < 0.35:
        schema = {
            "$defs": {"leaf": _leaf(source), "pair": {**_object(source, 1), "description": "two"}},
            "type": "object",
            "properties": {"first": {"$ref": "#/$defs/leaf"}, "second": {"$ref": "#/$defs/pair"}, "rest": schema},
            "required": ["first"],
            "additionalProperties": False,
        }
    return schema


def _any(source: random.Random, depth: int) -> Schema:
    if depth == 0 or source.random() < 0.3:
        return _leaf(source)
    return source.choice((_object, _object, _array, _tuple, _alternatives))(source, depth - 1)


def _object(source: random.Random, depth: int) -> Schema:
    names = source.sample(WORDS, source.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: _any(source, depth) for name in names},
        "required": [name for name in names if source.random() < 0.6],
        "additionalProperties": False,
    }


def _array(source: random.Random, depth: int) -> Schema:
    fewest = source.randint(0, 2)
    return {
        "type": "array",
        "items": _any(source, depth),
        "minItems": fewest,
        "maxItems": fewest + source.randint(0, 2),
    }


def _tuple(source: random.Random, depth: int) -> Schema:
    items = [_any(source, depth) for _ in range(source.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _alternatives(source: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(source, depth) for _ in range(source.randint(2, 3))]}


def _leaf(source: random.Random) -> Schema:
    kinds: tuple[Callable[[random.Random], Schema], ...] = (_text, _number, _integer, _fixed, _fixed, _enumeration)
    return source.choice(kinds)(source)


def _text(source: random.Random) -> Schema:
    fewest = source.randint(0, 3)
    bounded = {"type": "string", "minLength": fewest, "maxLength": fewest + source.randint(0, 12)}
    formatted = {"type": "string", "format": source.choice(FORMATS)}
    return source.choice((bounded, {"type": "string", "pattern": source.choice(PATTERNS)}, formatted))


def _integer(source: random.Random) -> Schema:
    lowest = source.randint(-1000, 1000)
    multiple = {"multipleOf": source.choice((2, 5, 10))} if source.random() < 0.2 else {}
    return {"type": "integer", "minimum": lowest, "exclusiveMaximum": lowest + source.randint(11, 500), **multiple}


def _number(source: random.Random) -> Schema:
    """Of few digits: a random model would add decimals until its tokens run out."""
    lowest = source.randint(-50, 50)
    return {"type": "number", "minimum": lowest, "maximum": lowest + source.randint(1, 9), "multipleOf": 0.5}


def _fixed(source: random.Random) -> Schema:
    return source.choice(({"type": "boolean"}, {"type": "null"}, {"const": "fixed"}, {"const": [1, {"a": None}]}))


def _enumeration(source: random.Random) -> Schema:
    return {"enum": source.sample(["red", "grün", 3, -0.5, None, True, ["x"], 'a "quoted" one\n'], 3)}
