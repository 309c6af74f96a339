"""Training data: lines of JSON → token sequences with a labelled part → padded batches. Knows no model.

A row is `{"prompt", "completion"}`, `{"text"}` or `{"messages"}`. Its sequence is the tokens of the prompt, the tokens
of the completion and end of text, prompt and completion tokenised separately; only what follows the prompt is labelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vblora.errors import DataError

KINDS = ({"prompt", "completion"}, {"text"}, {"messages"})


class Tokenizer(Protocol):
    """What is needed of a tokenizer; transformers' have it."""

    @property
    def eos_token_id(self) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> Any: ...
    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any: ...


@dataclass(frozen=True)
class Row:
    """One line of a data file; `where` is ``FILE:LINE``, for messages."""

    values: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Example:
    """A token sequence of which the tokens from `start` on (at least 1) are to be learnt."""

    tokens: tuple[int, ...]
    start: int

    @property
    def labels(self) -> int:
        return len(self.tokens) - self.start


@dataclass(frozen=True)
class Batch:
    """What a model is called with: `input_ids` (rows, length), and `attention_mask` or `position_ids` of that shape.

    `labels[i, t]` is the token that follows position t, -100 where nothing is predicted.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, self.labels.to(device))


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file; empty lines are skipped.

    Raises `DataError` that names the file, the line and what `check_row` found there.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _row(line: bytes, where: str) -> Row:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start + 1} of the line") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be a JSON object, not {type(values).__name__}")
    row = Row(values, where)
    check_row(row)
    return row


def check_row(row: Row) -> None:
    """All that can be said of a row without a tokenizer.

    Raises `DataError` for unknown or missing fields, values of a wrong type, empty ones, and text that is not Unicode.
    """
    if row.values.keys() not in KINDS:
        raise DataError(
            f"{row.where}: expected the fields prompt and completion, or text, or messages; "
            f"found {', '.join(map(str, row.values)) or 'none'}"
        )
    if "messages" in row.values:
        _check_messages(row)
    for field, value in row.values.items():
        if field != "messages":
            _check_text(value, f"{row.where}: {field}", may_be_empty=field == "prompt")


def _check_messages(row: Row) -> None:
    messages = row.values["messages"]
    if not isinstance(messages, list):
        raise DataError(f"{row.where}: messages must be a list, not {type(messages).__name__}")
    for index, message in enumerate(messages):
        where = f"{row.where}: messages[{index}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{where} must be an object with role and content")
        _check_text(message["role"], f"{where}.role")
        _check_text(message["content"], f"{where}.content", may_be_empty=index < len(messages) - 1)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{row.where}: messages must end with an answer by the assistant")


def _check_text(value: object, what: str, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, not {type(value).__name__}")
    if not value and not may_be_empty:
        raise DataError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half of a surrogate pair at character {error.start + 1}") from error


def encode(row: Row, tokenizer: Tokenizer, max_length: int) -> Example:
    """The example of a row, cut after `max_length` tokens.

    Raises `DataError` as `check_row` does, for messages that the chat template refuses, and for a prompt that leaves
    no room.
    """
    check_row(row)
    if "messages" in row.values:
        prompt, completion = _render(row, tokenizer)
        start, rest = _tokens(tokenizer, prompt, special=False), _tokens(tokenizer, completion, special=False)
    elif "text" in row.values:
        start, rest = [], _tokens(tokenizer, row.values["text"], special=True)
    else:
        start = _tokens(tokenizer, row.values["prompt"], special=True)
        rest = _tokens(tokenizer, row.values["completion"], special=False)
    if rest[-1:] != [tokenizer.eos_token_id]:
        rest = [*rest, tokenizer.eos_token_id]
    example = Example(tuple([*start, *rest][:max_length]), max(len(start), 1))
    if example.labels <= 0:
        raise DataError(f"{row.where}: the prompt has {len(start)} tokens, and {max_length} is the most a row may have")
    return example


def _tokens(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=special))


def _render(row: Row, tokenizer: Tokenizer) -> tuple[str, str]:
    """The chat template's text up to the last answer, and the answer with what the template puts after it."""
    messages = row.values["messages"]
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except Exception as error:  # a template is a program: it raises what it likes
        raise DataError(f"{row.where}: the chat template refuses these messages: {error}") from error
    if not full.startswith(prompt):
        raise DataError(f"{row.where}: the chat template does not continue its own prompt with the answer")
    return prompt, full[len(prompt) :]


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad on the right to the longest."""
    length = max(len(example.tokens) for example in examples)
    input_ids = torch.full((len(examples), length), pad_token_id)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), -100)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.tokens)
        input_ids[row, : len(tokens)] = tokens
        attention_mask[row, : len(tokens)] = 1
        labels[row, example.start - 1 : len(tokens) - 1] = tokens[example.start :]
    return Batch({"input_ids": input_ids, "attention_mask": attention_mask}, labels)


def pack(examples: Sequence[Example]) -> Batch:
    """Lay the examples end to end in one row, without padding: positions begin anew with each, which is what tells
    transformers' attention to keep them apart."""
    rows = [collate([example], 0) for example in examples]
    input_ids = torch.cat([row.inputs["input_ids"] for row in rows], dim=1)
    position_ids = torch.cat([torch.arange(len(example.tokens)) for example in examples]).unsqueeze(0)
    labels = torch.cat([row.labels for row in rows], dim=1)
    return Batch({"input_ids": input_ids, "position_ids": position_ids}, labels)


def shuffled_batches(count: int, batch_size: int, seed: int, first_step: int) -> Iterator[list[int]]:
    """Endless batches of indices below `count`, from step `first_step` on: a permutation for each epoch and seed."""
    per_epoch = -(-count // batch_size)
    epoch, skipped = divmod(first_step, per_epoch)
    while True:
        order = _permutation(count, seed, epoch)
        for position in range(skipped, per_epoch):
            yield order[position * batch_size : (position + 1) * batch_size]
        epoch, skipped = epoch + 1, 0


def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(Training rows, held-out rows): a random `fraction` is held out, at least one row of two or more."""
    held = max(round(len(rows) * fraction), 1) if fraction > 0 and len(rows) > 1 else 0
    order = _permutation(len(rows), seed, -1)
    chosen = set(order[:held])
    return (
        [row for index, row in enumerate(rows) if index not in chosen],
        [row for index, row in enumerate(rows) if index in chosen],
    )
