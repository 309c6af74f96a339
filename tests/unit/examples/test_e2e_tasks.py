"""The example that makes training rows: what each task asks, and a split that leaks nothing."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "examples" / "e2e_tasks.py"


def restaurants() -> list[tuple[str, str]]:
    return [
        (f"name[Place {n}], area[riverside], priceRange[£{n}]", f"Place {n} is by the  river, {style} it costs £{n}.")
        for n in range(40)
        for style in ("and", "where", "but")
    ]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    with (folder / "in.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("mr", "ref"), *restaurants()])
    for name in ("out", "again"):
        subprocess.run([sys.executable, SCRIPT, folder / "in.csv", folder / name], check=True, capture_output=True)
    return folder / "out"


def rows(out: Path, name: str) -> list[tuple[str, str]]:
    chats = [json.loads(line)["messages"] for line in (out / f"{name}.jsonl").read_text("utf-8").splitlines()]
    assert all([turn["role"] for turn in chat] == ["user", "assistant"] for chat in chats)
    return [(chat[0]["content"], chat[1]["content"]) for chat in chats]


def test_each_task_asks_what_it_says(out: Path) -> None:
    meaning = {" ".join(sentence.split()): mr for mr, sentence in restaurants()}
    for sentence, answer in rows(out, "describe.train"):
        assert answer == meaning[sentence]
    for sentence, answer in rows(out, "json.train"):
        assert "\n" not in answer
        assert ", ".join(f"{key}[{value}]" for key, value in json.loads(answer).items()) == meaning[sentence]
    for sentence, answer in rows(out, "capitals.train"):
        assert answer == sentence.upper()
    for sentence, answer in rows(out, "rephrase.train"):
        assert answer != sentence
        assert meaning[answer] == meaning[sentence]


@pytest.mark.parametrize("task", ["describe", "json", "capitals", "rephrase"])
def test_no_restaurant_is_both_trained_on_and_held_out(task: str, out: Path) -> None:
    meaning = {" ".join(sentence.split()): mr for mr, sentence in restaurants()}
    train, held_out = (
        {meaning[sentence] for sentence, _ in rows(out, f"{task}.{part}")} for part in ("train", "heldout")
    )
    assert train
    assert held_out
    assert train.isdisjoint(held_out)


def test_the_same_seed_writes_the_same_bytes(out: Path) -> None:
    for path in out.iterdir():
        assert path.read_bytes() == (out.parent / "again" / path.name).read_bytes()
