"""Rows → sequences → batches: what is labelled, and what a bad row is told."""

from __future__ import annotations

import json
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_tokenizer
from vblora import DataError
from vblora.data import Row, collate, encode, read_rows, shuffled_batches, split


def example(values: dict[str, Any], max_length: int = 100) -> tuple[list[int], list[int]]:
    """(The unlabelled tokens, the labelled ones) of a row."""
    found = encode(Row(values, "rows.jsonl:7"), tiny_tokenizer(), max_length)
    return list(found.tokens[: found.start]), list(found.tokens[found.start :])


def tokens(text: str, *, special: bool = False) -> list[int]:
    found: list[int] = tiny_tokenizer().encode(text, add_special_tokens=special)
    return found


def test_prompt_and_completion_are_tokenised_separately() -> None:
    eos = tiny_tokenizer().eos_token_id
    assert example({"prompt": "the quick bro", "completion": "wn fox"}) == (
        tokens("the quick bro", special=True),
        [*tokens("wn fox"), eos],
    )


def test_text_is_labelled_from_its_second_token() -> None:
    bos, *rest = tokens("the town", special=True)
    assert example({"text": "the town"}) == ([bos], [*rest, tiny_tokenizer().eos_token_id])


def test_messages_label_the_last_answer_only() -> None:
    messages = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "a fox"}]
    assert example({"messages": messages}) == (
        tokens("user: who?\nassistant:"),
        [*tokens(" a fox\n"), tiny_tokenizer().eos_token_id],
    )


def test_long_rows_are_cut() -> None:
    prompt, labelled = example({"prompt": "ab", "completion": "the fox jumps over the dog"}, 6)
    assert len(prompt) + len(labelled) == 6
    assert tiny_tokenizer().eos_token_id not in labelled


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "found none"),
        ({"prompt": "a"}, "expected the fields prompt and completion"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "expected the fields"),
        ({"prompt": 3, "completion": "b"}, "prompt must be a string, not int"),
        ({"prompt": "a", "completion": None}, "completion must be a string"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"text": ""}, "text is empty"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object with role and content"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] must be an object with role and content"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content must be a string, not int"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "content is empty"),
        ({"text": "half a pair: \ud83d"}, "text holds half of a surrogate pair at character 14"),
        ({"messages": [{"role": "user", "content": "a"}]}, "must end with an answer"),
        ({"prompt": "the fox " * 100, "completion": "b"}, "the prompt has"),
    ],
)
def test_bad_rows_say_where_and_what(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:7: .*{message}"):
        example(values)


def test_files_are_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [(row.values["text"], row.where) for row in read_rows(file)] == [("a", f"{file}:1"), ("b", f"{file}:3")]
    for content, message in (
        ('{"text": "a"}\n{', ":2: not valid JSON"),
        ("[1]", ":1: must be a JSON object"),
        ("\n", "no rows"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            read_rows(file)
    file.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r":2: not UTF-8 text: .* at byte 14 of the line"):
        read_rows(file)
    file.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(DataError, match=":2: text must be a string, not int"):  # before any model is loaded
        read_rows(file)
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "missing.jsonl")


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    text = "one\u2028two\x85three"
    file.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row.values["text"] for row in read_rows(file)] == [text]


def test_batches_predict_the_next_token_of_the_labelled_part() -> None:
    rows = [{"prompt": "a", "completion": "the fox jumps"}, {"prompt": "the", "completion": "b"}]
    examples = [encode(Row(row, ""), tiny_tokenizer(), 100) for row in rows]
    batch = collate(examples, pad_token_id=2)
    assert batch.inputs["attention_mask"].sum(-1).tolist() == [len(found.tokens) for found in examples]
    for row, found in enumerate(examples):
        labelled = [(place, int(label)) for place, label in enumerate(batch.labels[row]) if label != -100]
        wanted = list(enumerate(found.tokens))[found.start :]
        assert [(place + 1, label) for place, label in labelled] == wanted


def test_every_row_once_an_epoch_and_the_same_order_for_a_seed() -> None:
    batches = list(islice(shuffled_batches(7, 3, 5, 0), 9))
    for epoch in range(3):
        assert sorted(chain.from_iterable(batches[epoch * 3 : epoch * 3 + 3])) == list(range(7))
    assert batches[:3] != batches[3:6]
    for first in range(1, 9):
        assert list(islice(shuffled_batches(7, 3, 5, first), 9 - first)) == batches[first:]
    assert list(islice(shuffled_batches(7, 3, 6, 0), 9)) != batches


def test_split_holds_out_a_share() -> None:
    rows = [Row({"text": str(number)}, "") for number in range(20)]
    kept, held_out = split(rows, 0.1, 0)
    assert (len(kept), len(held_out)) == (18, 2)
    assert {row.values["text"] for row in (*kept, *held_out)} == {row.values["text"] for row in rows}
    assert split(rows, 0, 0) == (rows, [])
    assert split(rows[:1], 0.5, 0) == (rows[:1], [])
