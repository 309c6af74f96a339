"""The optimizer's loop: what is trained at which rate, one step after another. Knows no files and no command lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from vblora.data import Batch, Example, collate, pack, shuffled_batches
from vblora.errors import ConfigError
from vblora.loss import batch_loss
from vblora.model import VBLoRAModel
from vblora.parameters import param_groups

MIXED_PRECISION = ("none", "bfloat16")
# Of the relative difference of two losses that differ by rounding only, by the bytes of an element of the weights.
_ROUNDING = {4: 1e-4, 2: 1e-2}


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. Lengths are tokens; `max_steps` None means `epochs`; `save_steps` 0 keeps no snapshots.

    With `packing`, the rows of a step lie end to end in one sequence, without padding, and see only themselves. With
    `mixed_precision` "bfloat16" the base model's operations run in bfloat16 on weights of another dtype.

    The learning rate climbs over `warmup_ratio` of the steps and falls linearly to zero. Raises `ConfigError`.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 8
    logits_lr: float = 1e-2
    bank_lr: float = 1e-3
    other_lr: float = 1e-3
    warmup_ratio: float = 0.05
    max_length: int = 512
    eval_fraction: float = 0.05
    save_steps: int = 100
    seed: int = 0
    packing: bool = False
    mixed_precision: str = "none"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, not {self.max_steps}")
        if self.mixed_precision not in MIXED_PRECISION:
            raise ConfigError(
                f"mixed_precision must be one of {', '.join(MIXED_PRECISION)}, not {self.mixed_precision!r}"
            )
        if self.save_steps < 0 or self.seed < 0:
            raise ConfigError("save_steps and seed must not be negative")
        for name in ("logits_lr", "bank_lr", "other_lr"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise ConfigError(f"{name} must be a finite number from 0, not {getattr(self, name)}")
        for name in ("warmup_ratio", "eval_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), not {getattr(self, name)}")

    def steps(self, rows: int) -> int:
        """Optimizer steps of the whole training."""
        return self.max_steps or self.epochs * math.ceil(rows / self.batch_size)


class TrainingLoop:
    """Trains adapters of one model in turn, each on its own examples: step t is that of adapter t modulo their number.

    `tasks` are the examples by the adapter's name; a model that is no `VBLoRAModel` has one task, of any name. All of
    a step's parameters are in `parameters`, in the order of the optimizer.
    """

    def __init__(
        self, model: nn.Module, tasks: Mapping[str, Sequence[Example]], pad_token_id: int, options: TrainingOptions
    ) -> None:
        self.model, self.tasks, self.pad_token_id, self.options = model, dict(tasks), pad_token_id, options
        if isinstance(model, VBLoRAModel):
            model.set_adapter(list(tasks))
        groups = param_groups(model, options.logits_lr, options.bank_lr, options.other_lr)
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self.optimizer: Optimizer = AdamW(groups)
        self.device = self.parameters[0].device
        if options.packing:
            self._check_packing()

    def run(self, steps: int, losses: list[float]) -> Iterator[None]:
        """One optimizer step at a time, up to `steps`, from where `losses` stand; each step's loss is appended."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        first, number = len(losses), len(self.tasks)
        batches = [
            shuffled_batches(len(examples), self.options.batch_size, self.options.seed, (first + done) // number)
            for done, examples in zip(range(number - 1, -1, -1), self.tasks.values(), strict=True)
        ]
        names = list(self.tasks)
        self.model.train()
        for step in range(first, steps):
            name = names[step % number]
            if isinstance(self.model, VBLoRAModel) and number > 1:
                self.model.set_adapter(name)
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, steps, self.options.warmup_ratio)
            batch = self._batch([self.tasks[name][index] for index in next(batches[step % number])])
            losses.append(self._step(batch))
            yield

    def _step(self, batch: Batch) -> float:
        with self.model.composed() if isinstance(self.model, VBLoRAModel) else nullcontext():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.mixed_precision == "bfloat16"):
                loss, count = batch_loss(self.model, batch)
            torch.autograd.backward(loss / count)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item() / count

    def _batch(self, examples: Sequence[Example]) -> Batch:
        return pack(examples) if self.options.packing else collate(examples, self.pad_token_id)

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Raise `ConfigError` if rows that lie end to end see each other, by their loss beside that of padded rows."""
        examples = [example for rows in self.tasks.values() for example in rows][:3]
        was_training = self.model.training
        self.model.eval()
        packed, padded = (
            batch_loss(self.model, batch) for batch in (pack(examples), collate(examples, self.pad_token_id))
        )
        self.model.train(was_training)
        tolerance = _ROUNDING[next(self.model.parameters()).dtype.itemsize]
        if not math.isclose(packed[0].item(), padded[0].item(), rel_tol=tolerance):
            raise ConfigError("packing: rows in one sequence see each other in this base model; train without packing")


def schedule(step: int, steps: int, warmup_ratio: float) -> float:
    """The factor of the learning rates at a step: up over the warm-up, then down to zero after the last step."""
    warmup = math.ceil(steps * warmup_ratio)
    return (step + 1) / warmup if step < warmup else (steps - step) / max(steps - warmup, 1)
