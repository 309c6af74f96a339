"""`vblora train` on every customer's file with one row broken at a time: the line, and what is wrong with it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples.customers.evidence import DATA
from examples.customers.styles import STYLES
from vblora.cli import main


def of_turns(change: Callable[[Any], object]) -> Callable[[bytes], bytes]:
    """A break of the row's messages, in place."""

    def broken(line: bytes) -> bytes:
        row = json.loads(line)
        change(row["messages"])
        return json.dumps(row, ensure_ascii=False).encode()

    return broken


BREAKS: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda line: line[: len(line) // 2], "not valid JSON"),
    (lambda line: line.replace(b'"messages"', b'"message"'), "expected the fields .*; found message"),
    (lambda line: b"[" + line + b"]", "must be a JSON object, not list"),
    (lambda line: line.replace(b"a", b"\xff", 1), "not UTF-8 text"),
    (lambda line: b'{"messages": "hello"}', "messages must be a list, not str"),
    (of_turns(lambda turns: turns.pop()), "messages must end with an answer by the assistant"),
    (of_turns(lambda turns: turns.reverse()), "messages must end with an answer by the assistant"),
    (of_turns(lambda turns: turns[1].pop("content")), r"messages\[1\] must be an object with role and content"),
    (of_turns(lambda turns: turns[1].update(content="")), r"messages\[1\].content is empty"),
    (of_turns(lambda turns: turns[0].update(content=7)), r"messages\[0\].content must be a string, not int"),
    (of_turns(lambda turns: turns[0].update(role=None)), r"messages\[0\].role must be a string, not NoneType"),
    (
        lambda line: line.replace(b'"content": "', b'"content": "\\ud800', 1),
        r"messages\[0\].content holds half of a surrogate pair at character 1",
    ),
]


@pytest.mark.parametrize("customer", STYLES)
@pytest.mark.parametrize(("part", "flag"), [("train", "--data"), ("heldout", "--eval-data")])
def test_the_line_and_the_fault_are_named(
    customer: str,
    part: str,
    flag: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    lines = (DATA / f"{customer}.{part}.jsonl").read_bytes().splitlines()
    file = tmp_path / "rows.jsonl"
    files = {"--data": DATA / f"{customer}.train.jsonl", flag: file}
    arguments = [str(word) for pair in files.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["vblora", "train", "--model", "demo", "--out", str(tmp_path / "out"), *arguments])
    for number, line in enumerate(lines, 1):
        change, fault = BREAKS[number % len(BREAKS)]
        assert change(line) != line
        file.write_bytes(b"\n".join([*lines[: number - 1], change(line), *lines[number:]]))
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr().err
        assert ended.value.code == 1
        assert re.search(rf"rows\.jsonl:{number}: {fault}", told), told
        assert not (tmp_path / "out").exists()
