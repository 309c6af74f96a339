"""Reading calls out of an answer, however it is cut into pieces."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.api.tools import ToolCallReader
from serving.types import TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_CALL_MIDDLE


def written(name: str, arguments: str) -> str:
    return f"{TOOL_CALL_BEGIN}{json.dumps(name)}{TOOL_CALL_MIDDLE}{arguments}{TOOL_CALL_END}"


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]], str, dict[int, str]]:
    """(content, calls) as the reader keeps them, and the same as its deltas tell them."""
    reader = ToolCallReader()
    content, arguments = "", {}
    for index, piece in enumerate(pieces):
        reading = reader.read(piece, last=index == len(pieces) - 1)
        content += reading.content
        for delta in reading.deltas:
            arguments[delta["index"]] = arguments.get(delta["index"], "") + delta["function"]["arguments"]
    return reader.content, [(call.name, call.arguments) for call in reader.calls], content, arguments


TEXT = st.text("ab<>{}\n", max_size=8).filter(lambda text: "<tool_call>" not in text)
ARGUMENTS = st.dictionaries(st.text("ab}<", max_size=3), st.text('}\n</tool_call>"', max_size=12), max_size=2).map(
    json.dumps
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(TEXT, st.lists(st.tuples(st.sampled_from(["f", "get_weather"]), ARGUMENTS), max_size=3), st.data())
def test_any_cut_into_pieces_is_read_alike(text: str, calls: list[tuple[str, str]], data: st.DataObject) -> None:
    whole = text + "\n".join(written(*call) for call in calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    content, found, told, arguments = read(pieces)
    assert content == told == text
    assert found == calls
    assert [arguments[index] for index in range(len(calls))] == [call[1] for call in calls]


def test_text_that_may_begin_a_call_is_told_once_it_does_not() -> None:
    reader = ToolCallReader()
    assert reader.read("a <tool", last=False).content == "a "
    assert reader.read("box>", last=False).content == "<toolbox>"
    assert reader.read("<tool_call>\n", last=True).content == "<tool_call>\n"


def test_a_call_cut_off_keeps_what_there_is() -> None:
    content, calls, *_ = read([TOOL_CALL_BEGIN + '"f"' + TOOL_CALL_MIDDLE + '{"a": 1'])
    assert (content, calls) == ("", [("f", '{"a": 1')])
    content, calls, *_ = read([TOOL_CALL_BEGIN + '"get_w'])
    assert (content, calls) == (TOOL_CALL_BEGIN + '"get_w', [])


def test_text_between_calls_is_content_unless_it_is_blank() -> None:
    content, calls, *_ = read([written("f", "{}") + "\n and \n" + written("g", "{}")])
    assert content == "\n and \n"
    assert [name for name, _ in calls] == ["f", "g"]
