"""The text of an answer, as it comes → what it says and the calls it makes. Knows the one way in which calls are
written (`serving.types`), and no model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from serving.types import TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_CALL_MIDDLE, ToolCall


@dataclass(slots=True)
class Reading:
    """What a piece of text added: content, and OpenAI's deltas of calls."""

    content: str = ""
    deltas: list[dict[str, Any]] = field(default_factory=list)


class ToolCallReader:
    """Splits one answer. Text that may be the beginning of a call, or of a call's end, is held back until it is known
    not to be. Line breaks between calls are no content."""

    def __init__(self) -> None:
        self.content = ""
        self.calls: list[ToolCall] = []
        self._text = ""
        self._in: Literal["content", "name", "arguments"] = "content"

    def read(self, text: str, *, last: bool) -> Reading:
        """Take the next piece; after the `last` one nothing is held back."""
        self._text += text
        reading = Reading()
        while self._advance(reading):
            pass
        self._say(reading, self._all() if last else self._certain())
        return reading

    def _advance(self, reading: Reading) -> bool:
        """Go on to the next part of the answer, if the present one is complete."""
        mark = {"content": TOOL_CALL_BEGIN, "name": TOOL_CALL_MIDDLE, "arguments": TOOL_CALL_END}[self._in]
        before, found, after = self._text.partition(mark)
        if not found:
            return False
        if self._in == "name":
            self._begin_call(reading, json.loads(before))
        else:
            self._say(reading, before)
        self._text = after
        self._in = {"content": "name", "name": "arguments", "arguments": "content"}[self._in]  # type: ignore[assignment]
        return True

    def _begin_call(self, reading: Reading, name: str) -> None:
        call = ToolCall(f"call_{uuid4().hex[:24]}", name, "")
        function = {"name": name, "arguments": ""}
        reading.deltas.append({"index": len(self.calls), "id": call.id, "type": "function", "function": function})
        self.calls.append(call)

    def _say(self, reading: Reading, text: str) -> None:
        if self._in == "arguments" and text:
            call = self.calls[-1]
            self.calls[-1] = ToolCall(call.id, call.name, call.arguments + text)
            reading.deltas.append({"index": len(self.calls) - 1, "function": {"arguments": text}})
        elif self._in == "content" and (not self.calls or text.strip()):
            self.content += text
            reading.content += text

    def _certain(self) -> str:
        """Takes what can be told already; a name is told as a whole."""
        if self._in == "name":
            return ""
        mark = TOOL_CALL_BEGIN if self._in == "content" else TOOL_CALL_END
        longest = min(len(self._text), len(mark) - 1)
        held = next((size for size in range(longest, 0, -1) if self._text.endswith(mark[:size])), 0)
        told, self._text = self._text[: len(self._text) - held], self._text[len(self._text) - held :]
        return told

    def _all(self) -> str:
        """Takes what is left; a call cut off within its name is content."""
        text, self._text = self._text, ""
        if self._in == "name":
            self._in, text = "content", TOOL_CALL_BEGIN + text
        return text
