"""What an answer must match → the text of a grammar for llguidance. Compiles nothing and knows no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from serving.types import TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_CALL_MIDDLE, Structure

MAX_TEXT = 512 * 1024  # characters
# JSON as Python's `json.dumps` writes it. Free whitespace would let a model go on with it for ever.
WRITING = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "coerce_one_of": False,
    "lenient": False,
}
# Any token goes on that the grammar allows, not only the one by which the tokenizer would write what must come next.
OPTIONS = '%llguidance {"no_forcing": true}'
_CALL_OPENS, _, _CALL_GOES_ON = TOOL_CALL_BEGIN.partition("\n")
_CALL_CLOSES = TOOL_CALL_END.rpartition("\n")[2]


def grammar_of(structure: Structure, single: Callable[[str], int | None]) -> str:
    """The grammar in llguidance's Lark. `single` gives the token that is exactly a text, where there is one.

    Raises ValueError for what cannot even be read; that the result can be compiled is not said.
    """
    if len(structure.text) > MAX_TEXT:
        raise ValueError(f"it has {len(structure.text)} characters, and at most {MAX_TEXT} are allowed")
    try:
        lark = _lark(structure, single)
    except RecursionError:
        raise ValueError("it is too deeply nested") from None
    return f"{lark}\n{OPTIONS}\n"


def _lark(structure: Structure, single: Callable[[str], int | None]) -> str:
    match structure.kind:
        case "json_object":
            return f"start: %json {_schema({'type': 'object'})}"
        case "json_schema":
            return f"start: %json {_schema(json.loads(structure.text))}"
        case "regex":
            return f"start: /{regex_to_lark(structure.text, use_ascii='')}/"
        case "choice":
            return _choice(json.loads(structure.text))
        case "grammar":
            return _grammar(structure.text)
        case "tools":
            return _tools(json.loads(structure.text), single)


def _choice(choices: Any) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("it must be a list of strings, and not an empty one")
    return "start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, choices))


def _grammar(text: str) -> str:
    """Lark as it is, and llama.cpp's GBNF as Lark."""
    try:
        return any_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # the converter raises all kinds
        raise ValueError(str(error)) from error


def _tools(wanted: dict[str, Any], single: Callable[[str], int | None]) -> str:
    """Calls of tools in Lark, or what else the answer may be.

    Where any text will do, a call must follow once the text holds ``<tool_call>``, and nothing but calls follows a
    call. Models that have tokens of their own for the two tags may use them as well as their letters.
    """
    more = f'("\\n" {_tag(_CALL_OPENS, single)} call)*' if wanted["parallel"] else ""
    calls = f"{_tag(_CALL_OPENS, single)} call {more}"
    rules = [_start(wanted, calls, more)]
    if not wanted["required"] and wanted["answer"] is None:
        opening = single(_CALL_OPENS)
        rules += [
            "TEXT: /(.|\\n)*/",
            f"opened[lazy]: TEXT {_quoted(_CALL_OPENS)}",
            "opening: opened" if opening is None else f"opening: opened | TEXT <[{opening}]>",
        ]
    elif not wanted["required"]:
        rules.append(f"answer: %json {_schema(wanted['answer'])}")
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(wanted["tools"]))))
    for number, tool in enumerate(wanted["tools"]):
        rules += _call(number, tool, single)
    return "\n".join(rules)


def _start(wanted: dict[str, Any], calls: str, more: str) -> str:
    if wanted["required"]:
        return f"start: {calls}"
    return f"start: TEXT | opening call {more}" if wanted["answer"] is None else f"start: {calls} | answer"


def _call(number: int, tool: dict[str, Any], single: Callable[[str], int | None]) -> list[str]:
    """The rules of one tool's call, from behind the opening tag."""
    before = f"\n{_CALL_GOES_ON}{json.dumps(tool['name'])}{TOOL_CALL_MIDDLE}"
    after = TOOL_CALL_END.removesuffix(_CALL_CLOSES)
    return [
        f"call_{number}: {_quoted(before)} arguments_{number} {_quoted(after)} {_tag(_CALL_CLOSES, single)}",
        f"arguments_{number}: %json {_schema(_arguments(tool))}",
    ]


def _arguments(tool: dict[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object even where it does not say so."""
    schema = tool["parameters"]
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise ValueError(f"the parameters of the tool {tool['name']} must be the schema of an object")
    return {**schema, "type": "object"}


def _schema(schema: Any) -> str:
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    return json.dumps({**schema, "x-guidance": WRITING}, ensure_ascii=False)


def _tag(text: str, single: Callable[[str], int | None]) -> str:
    """The Lark of a tag of tool calls: its text, or the token that it is."""
    token = single(text)
    return _quoted(text) if token is None else f"({_quoted(text)} | <[{token}]>)"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
