"""Four small tasks from a CSV of restaurant descriptions, as chat rows that `vblora train` reads.

The CSV has the columns `mr` ("name[Alimentum], area[city centre]") and `ref` (a sentence that says the same), as the
E2E NLG data (Novikova, Dušek, Rieser 2017, CC BY-SA 4.0) has. Every task is given the sentence:

    describe   the attributes, as in `mr`
    json       the attributes, as one line of JSON
    capitals   the sentence in capitals
    rephrase   another sentence about the same restaurant

    python examples/e2e_tasks.py restaurants.csv OUT

writes OUT/<task>.train.jsonl and OUT/<task>.heldout.jsonl. No `mr` of a held-out row appears in a training row.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TRAIN_ROWS = 2000
HELD_OUT_ROWS = 100
HELD_OUT_SHARE = 0.15
_ATTRIBUTE = re.compile(r"([^,\[\]]+)\[([^\]]*)\]")


@dataclass(frozen=True)
class Restaurant:
    """One line of the CSV: `mr`, its sentence, and another sentence of the same `mr` (None if there is none)."""

    mr: str
    sentence: str
    other: str | None

    def attributes(self) -> dict[str, str]:
        return {key.strip(): value for key, value in _ATTRIBUTE.findall(self.mr)}


TASKS: dict[str, Callable[[Restaurant], str | None]] = {
    "describe": lambda row: row.mr,
    "json": lambda row: json.dumps(row.attributes(), ensure_ascii=False, separators=(",", ":")),
    "capitals": lambda row: row.sentence.upper(),
    "rephrase": lambda row: row.other,
}


def read_restaurants(path: Path) -> dict[str, list[Restaurant]]:
    """The CSV's lines by `mr`, in the file's order; each sentence's `other` is the next different one."""
    sentences: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            sentence = " ".join(line["ref"].split())
            if sentence not in (known := sentences.setdefault(line["mr"], [])):
                known.append(sentence)
    return {mr: list(_in_pairs(mr, known)) for mr, known in sentences.items()}


def _in_pairs(mr: str, sentences: list[str]) -> Iterator[Restaurant]:
    for sentence, following in zip(sentences, sentences[1:] + sentences[:1], strict=True):
        yield Restaurant(mr, sentence, following if following != sentence else None)


def split(restaurants: dict[str, list[Restaurant]], seed: int) -> tuple[list[Restaurant], list[Restaurant]]:
    """Training and held-out lines, shuffled; an `mr` is in one of them only."""
    generator = random.Random(seed)
    mrs = sorted(restaurants)
    generator.shuffle(mrs)
    cut = max(1, round(len(mrs) * HELD_OUT_SHARE))
    held_out, train = ([row for mr in part for row in restaurants[mr]] for part in (mrs[:cut], mrs[cut:]))
    generator.shuffle(train)
    generator.shuffle(held_out)
    return train, held_out


def write_task(path: Path, task: str, rows: Iterable[Restaurant], limit: int) -> int:
    """Write at most `limit` rows of `task`; returns how many."""
    answers = ((row.sentence, TASKS[task](row)) for row in rows)
    chats = [
        [{"role": "user", "content": sentence}, {"role": "assistant", "content": answer}]
        for sentence, answer in answers
        if answer is not None
    ][:limit]
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the JSONL files of four small tasks from a CSV.")
    parser.add_argument("csv", type=Path, help="a file with the columns mr and ref")
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the order (default 0)")
    arguments = parser.parse_args()
    train, held_out = split(read_restaurants(arguments.csv), arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        trained_on = write_task(arguments.out / f"{task}.train.jsonl", task, train, TRAIN_ROWS)
        kept_back = write_task(arguments.out / f"{task}.heldout.jsonl", task, held_out, HELD_OUT_ROWS)
        print(f"{task}: {trained_on} rows to train on, {kept_back} held out")


if __name__ == "__main__":
    main()
