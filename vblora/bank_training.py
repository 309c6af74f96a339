"""Train one vector bank on the data of several customers, for adapters of others to share. Knows no command lines.

Each customer has logits of their own; the bank is trained by all of them in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from vblora.build import random_bank
from vblora.checkpoint import write_adapter
from vblora.config import VBLoRAConfig
from vblora.data import Example, Row, encode, split
from vblora.errors import ConfigError
from vblora.integrations.base_models import BaseModel
from vblora.loop import TrainingLoop, TrainingOptions
from vblora.loss import mean_loss, pad_token
from vblora.model import VBLoRAModel
from vblora.record import write_record
from vblora.session import run_session
from vblora.snapshot import remove_snapshot

BANK_FILE = "bank.safetensors"


@dataclass
class BankReport:
    """What came out. `steps` are of all customers together; losses are nats a labelled token, by customer; those of
    `held_out_before` and `_after` are empty without held-out rows."""

    steps: int
    rows: dict[str, int]
    held_out_rows: dict[str, int]
    held_out_before: dict[str, float] = field(default_factory=dict)
    held_out_after: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def losses_of(self, customer: str) -> list[float]:
        """The losses of one customer's steps, which come in turn."""
        names = list(self.rows)
        return self.losses[names.index(customer) :: len(names)]


def train_bank(
    base: BaseModel,
    config: VBLoRAConfig,
    customers: Mapping[str, Sequence[Row]],
    out: Path,
    options: TrainingOptions,
    *,
    resume: bool = False,
    on_step: Callable[[BankReport], None] = lambda report: None,
) -> BankReport:
    """Train a bank and write it to `out/bank.safetensors`, with each customer's adapter on it in `out/<customer>`, and
    `training.json`, `losses.csv` and `losses.png` beside it.

    A step is one customer's; they take turns. `epochs` are of the customer with most rows. Rows are held out of each
    customer's by `eval_fraction`. Seeds torch's default random stream; resuming is as in `train`. Raises `ConfigError`,
    `TargetError`, `AdapterNameError` and `DataError`.
    """
    if len(customers) < 2:
        raise ConfigError(f"a shared bank is trained on two customers or more, not {len(customers)}")
    kept: dict[str, list[Example]] = {}
    held_out: dict[str, list[Example]] = {}
    for name, rows in customers.items():
        parts = split(rows, options.eval_fraction, options.seed)
        kept[name], held_out[name] = (
            [encode(row, base.tokenizer, options.max_length) for row in part] for part in parts
        )
    steps = options.max_steps or len(kept) * max(options.steps(len(examples)) for examples in kept.values())
    report = BankReport(
        steps, {name: len(rows) for name, rows in kept.items()}, {name: len(rows) for name, rows in held_out.items()}
    )
    torch.manual_seed(options.seed)
    config = replace(config, task_type=config.task_type or "CAUSAL_LM", base_model_name_or_path=base.base_id)
    model = _adapted(base, config, list(customers))
    loop = TrainingLoop(model, kept, pad_token(base.tokenizer), options)
    fingerprint = {
        "config": config.to_dict(),
        "options": asdict(options),
        "customers": {name: [row.values for row in rows] for name, rows in customers.items()},
    }
    run_session(
        loop, report, out, fingerprint, evaluate=lambda: _evaluate(loop, held_out), resume=resume, on_step=on_step
    )
    for name in customers:
        write_adapter(out / name, model.checkpoint(name))
    model.bank(next(iter(customers))).save(out / BANK_FILE)
    losses = {name: report.losses_of(name) for name in customers}
    write_record(out, config, asdict(options), asdict(report), losses)
    remove_snapshot(out)
    return report


def _adapted(base: BaseModel, config: VBLoRAConfig, names: Sequence[str]) -> VBLoRAModel:
    bank = random_bank(config, base.model.device)
    model = VBLoRAModel(base.model, config, names[0], bank=bank)
    for name in names[1:]:
        model.add_adapter(name, config, bank=bank)
    return model


def _evaluate(loop: TrainingLoop, held_out: Mapping[str, Sequence[Example]]) -> dict[str, float]:
    losses = {}
    for name, examples in held_out.items():
        if examples and isinstance(loop.model, VBLoRAModel):
            loop.model.set_adapter(name)
            losses[name] = mean_loss(loop.model, examples, loop.pad_token_id, loop.options.batch_size)
    return losses
