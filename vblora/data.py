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
    """Right-padded `input_ids` and `attention_mask` (rows, length); `labels` is -100 where nothing is predicted.

    `labels[i, t]` is the token that follows position t.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file; empty lines are skipped. Raises `DataError` that names the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _row(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be a JSON object, not {type(values).__name__}")
    return Row(values, where)


def encode(row: Row, tokenizer: Tokenizer, max_length: int) -> Example:
    """The example of a row, cut after `max_length` tokens.

    Raises `DataError` for unknown or missing fields, values of a wrong type, and a prompt that leaves no room.
    """
    kind = next((kind for kind in KINDS if row.values.keys() == kind), None)
    if kind is None:
        raise DataError(
            f"{row.where}: expected the fields prompt and completion, or text, or messages; "
            f"found {', '.join(map(str, row.values)) or 'none'}"
        )
    if "messages" in kind:
        prompt, completion = _render(row, tokenizer)
        start, rest = _tokens(tokenizer, prompt, special=False), _tokens(tokenizer, completion, special=False)
    elif "text" in kind:
        start, rest = [], _tokens(tokenizer, _string(row, "text"), special=True)
    else:
        start = _tokens(tokenizer, _string(row, "prompt"), special=True)
        rest = _tokens(tokenizer, _string(row, "completion"), special=False)
    if rest[-1:] != [tokenizer.eos_token_id]:
        rest = [*rest, tokenizer.eos_token_id]
    example = Example(tuple([*start, *rest][:max_length]), max(len(start), 1))
    if example.labels <= 0:
        raise DataError(f"{row.where}: the prompt has {len(start)} tokens, and {max_length} is the most a row may have")
    return example


def _string(row: Row, field: str) -> str:
    value = row.values[field]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {field} must be a string, not {type(value).__name__}")
    if not value and field != "prompt":
        raise DataError(f"{row.where}: {field} is empty")
    return value


def _tokens(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=special))


def _render(row: Row, tokenizer: Tokenizer) -> tuple[str, str]:
    """The chat template's text up to the last answer, and the answer with what the template puts after it."""
    messages = row.values["messages"]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise DataError(f"{row.where}: messages must be a list of objects with the strings role and content")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{row.where}: messages must end with an answer by the assistant")
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except Exception as error:  # a template is a program: it raises what it likes
        raise DataError(f"{row.where}: the chat template refuses these messages: {error}") from error
    if not full.startswith(prompt):
        raise DataError(f"{row.where}: the chat template does not continue its own prompt with the answer")
    return prompt, full[len(prompt) :]


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(field), str) for field in ("role", "content"))


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
    return Batch(input_ids, attention_mask, labels)


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
