"""The evidence of the README: its tables and verdicts, on a tiny base model with adapters that cannot be good."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.customers.evidence import Answer, Table, plot, shortcomings
from tests.support import save_random_adapter, save_tiny_model, tiny_model

ROOT = Path(__file__).parents[4]
CUSTOMERS = ("saltspoke", "tallywire")


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for seed, customer in enumerate(CUSTOMERS):
        save_random_adapter(folder / customer, tiny_model(), seed=seed)
        report = {"report": {"losses": [5.0 / step for step in range(1, 20)]}}
        (folder / customer / "training.json").write_text(json.dumps(report))
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.customers.evidence", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_every_customer_is_measured_on_the_base_and_on_every_adapter(adapters: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    result = run("--model", model, "--adapters", adapters, "--rows", 3, "--answers")
    lines = result.stdout.splitlines()
    assert lines[0] == "| held-out text of | base | saltspoke | tallywire | own against base |", result.stderr
    for line, customer in zip(lines[2:4], CUSTOMERS, strict=True):
        name, *cells, share = line.strip("| ").split(" | ")
        figures = [float(cell.strip("*")) for cell in cells]
        assert (name, len(set(figures))) == (customer, 3)
        assert f"**{min(figures):.3f}**" in line
        own = figures[1 + CUSTOMERS.index(customer)]
        assert abs(1 - own / figures[0] - float(share.strip("−%")) / 100) < 0.006
    assert lines[5].startswith("| customer | in style")
    assert lines[7].startswith("| saltspoke | 0% |")
    assert result.stdout.count("→") == 2 * 2 * 3  # customers × (own, base) × rows
    assert result.returncode == 1
    assert "not good enough: saltspoke: 0.0% of the answers in style, not 70.0%" in result.stderr


def test_a_folder_without_adapters_is_refused(tmp_path: Path) -> None:
    result = run("--adapters", tmp_path)
    assert result.returncode == 2
    assert "holds no adapter of lanternlane, quillstone, saltspoke, tallywire" in result.stderr


def losses(own: float = 2.0, foreign: float = 3.0, base: float = 4.0) -> Table:
    one, other = CUSTOMERS
    return {one: {"base": base, one: own, other: foreign}, other: {"base": 4.0, one: 3.0, other: 2.0}}


def answers(in_style: int = 7, ended: int = 9) -> dict[str, dict[str, list[Answer]]]:
    """Ten answers of each customer; the base's are never in style."""
    own = [Answer("", "", n < ended, None if n < in_style else "wrong") for n in range(10)]
    return {name: {name: own, "base": [Answer("", "", False, "wrong")] * 10} for name in CUSTOMERS}


def test_good_enough_says_nothing() -> None:
    assert shortcomings(losses(), answers()) == []


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ((losses(foreign=1.9), answers()), ["saltspoke: another adapter is better on its text"]),
        ((losses(own=3.412, foreign=3.5), answers()), ["saltspoke: 14.7% below the base's loss, not 15.0%"]),
        ((losses(base=2.1), answers()), ["saltspoke: 4.8% below the base's loss, not 15.0%"]),
        ((losses(), answers(in_style=6)), [f"{name}: 60.0% of the answers in style, not 70.0%" for name in CUSTOMERS]),
        (
            (losses(), answers(ended=8)),
            [f"{name}: 80.0% of the answers end by themselves, not 90.0%" for name in CUSTOMERS],
        ),
    ],
)
def test_each_shortcoming_is_said(figures: tuple[Table, dict[str, dict[str, list[Answer]]]], said: list[str]) -> None:
    assert shortcomings(*figures) == said


def test_the_average_counts_too() -> None:
    table = {name: {"base": 4.0, name: 3.2} for name in CUSTOMERS}
    assert shortcomings(table, answers()) == ["20.0% below the base's loss on average, not 25.0%"]


def test_the_losses_are_drawn(adapters: Path, tmp_path: Path) -> None:
    target = tmp_path / "images" / "losses.png"
    plot(adapters, CUSTOMERS, target)
    first = target.read_bytes()
    assert re.match(rb"\x89PNG\r\n", first)
    plot(adapters, CUSTOMERS, target)
    assert target.read_bytes() == first
