"""The four customers on the real base model: what their adapters know, and rows that only its tokenizer can refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.customers.evidence import (
    BASE,
    DATA,
    LEAST_ENDED,
    LEAST_IN_STYLE,
    MAX_TOKENS,
    held_out,
    measure_losses,
    shortcomings,
)
from examples.customers.styles import STYLES
from serving.demo import ADAPTERS
from tests.e2e.conftest import Server
from vblora import DataError, VBLoRAConfig
from vblora.data import read_rows
from vblora.integrations.base_models import BaseModel
from vblora.loop import TrainingOptions
from vblora.training import train

ROWS = 6
LINE = 7


@pytest.mark.timeout(600)
def test_the_shipped_adapters_know_text_that_they_have_not_seen() -> None:
    """A part of the README's first table, by the script that makes it, and the bounds which that holds up."""
    customers = sorted(STYLES)
    table = measure_losses("demo", ADAPTERS, customers, ROWS)
    assert list(table) == customers
    for losses in table.values():
        assert set(losses) == {BASE, *customers}
    assert shortcomings(table, {}) == []


def test_the_served_adapters_speak_in_their_voices(server: Server) -> None:
    """A few held-out messages of all customers in one batch over HTTP; `make evidence` asks them all."""
    asked = [(name, row.values["messages"][0]["content"]) for name in STYLES for row in held_out(name, ROWS)]

    def ask(customer: str, message: str) -> dict[str, Any]:
        body = {"model": customer, "messages": [{"role": "user", "content": message}]}
        reply = httpx.post(
            f"{server.url}/v1/chat/completions", json={**body, "temperature": 0, "max_tokens": MAX_TOKENS}, timeout=250
        )
        choice: dict[str, Any] = reply.json()["choices"][0]
        return choice

    with ThreadPoolExecutor(len(asked)) as pool:
        choices = list(pool.map(ask, *zip(*asked, strict=True)))
    ended = [choice["finish_reason"] == "stop" for choice in choices]
    faults = [STYLES[name](choice["message"]["content"]) for (name, _), choice in zip(asked, choices, strict=True)]
    assert sum(ended) >= LEAST_ENDED * len(asked)
    assert sum(fault is None for fault in faults) >= LEAST_IN_STYLE * len(asked), faults


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
