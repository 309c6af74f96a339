"""The four customers on the real base model: what their adapters know, and rows that only its tokenizer can refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples.customers.evidence import DATA
from examples.customers.styles import STYLES
from tests.e2e.conftest import ROOT, tool_environment
from vblora import DataError, VBLoRAConfig
from vblora.data import read_rows
from vblora.integrations.base_models import BaseModel
from vblora.training import TrainingOptions, train

ROWS = 8
LINE = 7


def test_the_shipped_adapters_are_good_on_text_that_they_have_not_seen() -> None:
    """A part of the evidence in the README, by the script that makes it, against the bounds that it holds up."""
    command = [sys.executable, "-m", "examples.customers.evidence", "--rows", str(ROWS)]
    result = subprocess.run(command, cwd=ROOT, env=tool_environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for customer in STYLES:
        assert result.stdout.count(f"| {customer} |") == 3  # a column, a row of losses, a row of styles


def narrated(turns: Any) -> None:
    turns[0]["role"] = "narrator"


def endless(turns: Any) -> None:
    turns[0]["content"] = "far " * 600


@pytest.mark.parametrize("customer", STYLES)
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (narrated, "the chat template refuses these messages: unknown role narrator"),
        (endless, r"the prompt has \d+ tokens, and 512 is the most a row may have"),
    ],
)
def test_a_row_that_the_tokenizer_refuses_is_named(
    customer: str, change: Callable[[Any], None], fault: str, demo_base: BaseModel, tmp_path: Path
) -> None:
    lines = (DATA / f"{customer}.train.jsonl").read_text().splitlines()
    row = json.loads(lines[LINE - 1])
    change(row["messages"])
    lines[LINE - 1] = json.dumps(row)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    options = TrainingOptions(eval_fraction=0)
    with pytest.raises(DataError, match=rf"rows\.jsonl:{LINE}: {fault}"):
        train(demo_base, VBLoRAConfig(), read_rows(file), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
