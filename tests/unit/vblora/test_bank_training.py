"""A bank trained on the rows of several customers, and adapters on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny_model, tiny_tokenizer
from vblora import CheckpointError, ConfigError, DataError, VBLoRAConfig, VectorBank, read_adapter
from vblora.bank_training import BANK_FILE, BankReport, train_bank
from vblora.checkpoint import bank_hash
from vblora.data import Row
from vblora.integrations.base_models import BaseModel
from vblora.loop import TrainingOptions
from vblora.loss import evaluate_loss
from vblora.model import VBLoRAModel
from vblora.training import train


def rows(verb: str, count: int) -> list[Row]:
    names = ["Aroma", "Cotto", "Eagle", "Vaults", "Mill", "Strada", "Zizzi"][:count]
    return [Row({"prompt": f"name: {name}", "completion": f" {name} {verb}."}, f"{verb}:{name}") for name in names]


CUSTOMERS = {"ann": rows("serves tea", 7), "team.b": rows("is closed on Mondays", 5)}


def base() -> BaseModel:
    return BaseModel("tiny", tiny_model(), tiny_tokenizer())


def config(**values: Any) -> VBLoRAConfig:
    return VBLoRAConfig(**{"num_vectors": 16, "vector_length": 16, "target_modules": "all-linear", **values})


def options(**values: Any) -> TrainingOptions:
    return TrainingOptions(**{"max_steps": 40, "batch_size": 2, "save_steps": 0, "bank_lr": 1e-2, **values})


def test_every_customer_learns_on_the_one_bank(tmp_path: Path) -> None:
    report = train_bank(base(), config(), CUSTOMERS, tmp_path, options(eval_fraction=0.2))
    assert report.rows == {"ann": 6, "team.b": 4}
    assert report.held_out_rows == {"ann": 1, "team.b": 1}
    assert all(report.held_out_after[name] < report.held_out_before[name] - 0.3 for name in CUSTOMERS)
    bank = VectorBank.load(tmp_path / BANK_FILE)
    for name in CUSTOMERS:
        checkpoint = read_adapter(tmp_path / name)
        assert bank_hash(checkpoint.bank) == bank.hash
        assert checkpoint.config.base_model_name_or_path == "tiny"
        model = VBLoRAModel.from_pretrained(tiny_model(), tmp_path / name)
        alone = evaluate_loss(tiny_model(), tiny_tokenizer(), CUSTOMERS[name])
        assert evaluate_loss(model, tiny_tokenizer(), CUSTOMERS[name]) < alone - 0.3
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["report"]["losses"] == report.losses
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert lines[0] == "step,ann,team.b"
    assert len(lines) == 21


def test_the_customers_take_turns(tmp_path: Path) -> None:
    report = train_bank(base(), config(), CUSTOMERS, tmp_path, options(max_steps=5, eval_fraction=0))
    assert [report.losses_of(name) for name in CUSTOMERS] == [report.losses[::2], report.losses[1::2]]
    assert report.held_out_before == report.held_out_after == {}
    # Epochs count for the customer with most rows, and each of its steps for all.
    assert train_bank(base(), config(), CUSTOMERS, tmp_path, options(max_steps=None, eval_fraction=0)).steps == 8


def test_a_step_changes_the_bank_and_one_customers_logits(tmp_path: Path) -> None:
    """One step is the first customer's: the other's logits stay as they were drawn."""
    for name, steps in (("one", 1), ("two", 2)):
        train_bank(base(), config(), CUSTOMERS, tmp_path / name, options(max_steps=steps))
    one, two = ({c: read_adapter(tmp_path / run / c) for c in CUSTOMERS} for run in ("one", "two"))
    path = next(iter(one["ann"].modules))
    assert torch.equal(one["ann"].modules[path].a, two["ann"].modules[path].a)  # type: ignore[arg-type]
    assert not torch.equal(one["team.b"].modules[path].a, two["team.b"].modules[path].a)  # type: ignore[arg-type]
    assert bank_hash(one["ann"].bank) != bank_hash(two["ann"].bank)


class Interrupted(Exception):
    pass


def test_resuming_gives_the_bank_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole = train_bank(base(), config(), CUSTOMERS, tmp_path / "whole", options(max_steps=9, save_steps=3))

    def interrupt(report: BankReport) -> None:
        if len(report.losses) == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_bank(base(), config(), CUSTOMERS, tmp_path / "cut", options(max_steps=9, save_steps=3), on_step=interrupt)
    arguments = (base(), config(), CUSTOMERS, tmp_path / "cut", options(max_steps=9, save_steps=3))
    assert train_bank(*arguments, resume=True) == whole
    hashes = [VectorBank.load(tmp_path / name / BANK_FILE).hash for name in ("whole", "cut")]
    assert hashes[0] == hashes[1]
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train_bank(*arguments, resume=True)


def test_a_new_customer_trains_logits_on_the_frozen_bank(tmp_path: Path) -> None:
    train_bank(base(), config(), CUSTOMERS, tmp_path / "bank", options())
    bank = VectorBank.load(tmp_path / "bank" / BANK_FILE)
    text = rows("has a garden", 7)
    report = train(base(), config(), text, tmp_path / "new", options(), eval_rows=text, bank=bank, freeze_bank=True)
    assert report.held_out_before is not None and report.held_out_after is not None
    assert report.held_out_after < report.held_out_before - 0.3
    assert bank_hash(read_adapter(tmp_path / "new").bank) == bank.hash


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="two customers or more, not 1"):
        train_bank(base(), config(), {"ann": CUSTOMERS["ann"]}, out, options())
    broken = [*CUSTOMERS["ann"], Row({"prompt": "x"}, "rows:9")]
    with pytest.raises(DataError, match="rows:9"):
        train_bank(base(), config(), {**CUSTOMERS, "c": broken}, out, options())
    with pytest.raises(ValueError, match="cannot name an adapter"):
        train_bank(base(), config(), {**CUSTOMERS, "a/b": CUSTOMERS["ann"]}, out, options())
    assert not out.exists()
