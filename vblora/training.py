"""Train one adapter on one base model with a plain loop. Knows transformers' models, not command lines or terminals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from vblora.bank import VectorBank
from vblora.checkpoint import write_adapter
from vblora.config import VBLoRAConfig
from vblora.data import Batch, Example, Row, Tokenizer, collate, encode, shuffled_batches, split
from vblora.errors import ConfigError
from vblora.integrations.base_models import BaseModel
from vblora.model import VBLoRAModel, get_vblora_model
from vblora.parameters import param_groups
from vblora.snapshot import load_snapshot, remove_snapshot, save_snapshot
from vblora.tensorfile import write_atomically

HEAD_CHUNK = 128
REPORT_FILE = "training.json"


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. Lengths are tokens; `max_steps` None means `epochs`; `save_steps` 0 keeps no snapshots.

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

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, not {self.max_steps}")
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


@dataclass
class TrainingReport:
    """What came out. Losses are nats a labelled token; `held_out_before`, `_after` are None without held-out rows."""

    steps: int
    rows: int
    held_out_rows: int
    held_out_before: float | None = None
    held_out_after: float | None = None
    losses: list[float] = field(default_factory=list)


def train(
    base: BaseModel,
    config: VBLoRAConfig,
    rows: Sequence[Row],
    out: Path,
    options: TrainingOptions,
    *,
    eval_rows: Sequence[Row] | None = None,
    bank: VectorBank | None = None,
    freeze_bank: bool = False,
    resume: bool = False,
    on_step: Callable[[TrainingReport], None] = lambda report: None,
) -> TrainingReport:
    """Train an adapter and write it, with `training.json` beside it, into `out`. Seeds torch's default random stream.

    Rows are held out of `rows` unless `eval_rows` are given. With `resume`, training goes on from the snapshot in
    `out`, to the same weights as without the interruption. `on_step` is called after every step, and once before.
    Raises `ConfigError`, `TargetError` and `DataError`.
    """
    if freeze_bank and bank is None:
        raise ConfigError("freeze_bank needs a bank: a random one that is never trained would be of little use")
    kept, held_out = split(rows, 0.0 if eval_rows is not None else options.eval_fraction, options.seed)
    examples = [encode(row, base.tokenizer, options.max_length) for row in kept]
    held_out_examples = [encode(row, base.tokenizer, options.max_length) for row in eval_rows or held_out]
    torch.manual_seed(options.seed)
    config = replace(config, task_type=config.task_type or "CAUSAL_LM", base_model_name_or_path=base.base_id)
    model = get_vblora_model(base.model, config, bank=bank, freeze_bank=freeze_bank)
    report = TrainingReport(options.steps(len(examples)), len(examples), len(held_out_examples))
    loop = _Loop(model, examples, _pad_token(base.tokenizer), options, report)
    fingerprint = {"config": config.to_dict(), "options": asdict(options), "rows": [row.values for row in rows]}
    if resume:
        report.held_out_before, report.losses = load_snapshot(out, fingerprint, loop.parameters, loop.optimizer)
    elif held_out_examples:
        report.held_out_before = loop.evaluate(held_out_examples)
    on_step(report)
    for _ in loop.run():
        on_step(report)
        if options.save_steps and len(report.losses) % options.save_steps == 0 and len(report.losses) < report.steps:
            save_snapshot(out, fingerprint, loop.parameters, loop.optimizer, report.held_out_before, report.losses)
    report.held_out_after = loop.evaluate(held_out_examples) if held_out_examples else None
    write_adapter(out, model.checkpoint())
    _write_report(out / REPORT_FILE, model.peft_config["default"], options, report)
    remove_snapshot(out)
    return report


class _Loop:
    """The optimizer, its schedule and the steps still to go."""

    def __init__(
        self,
        model: VBLoRAModel,
        examples: Sequence[Example],
        pad_token_id: int,
        options: TrainingOptions,
        report: TrainingReport,
    ) -> None:
        self.model, self.examples, self.pad_token_id = model, examples, pad_token_id
        self.options, self.report = options, report
        groups = param_groups(model, options.logits_lr, options.bank_lr, options.other_lr)
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self.optimizer: Optimizer = AdamW(groups)
        self.device = self.parameters[0].device

    def run(self) -> Iterable[None]:
        """One optimizer step at a time, from where the report stands."""
        options, losses, first = self.options, self.report.losses, len(self.report.losses)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        batches = shuffled_batches(len(self.examples), options.batch_size, options.seed, first)
        self.model.train()
        for step, indices in zip(range(first, self.report.steps), batches, strict=False):
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, self.report.steps, options.warmup_ratio)
            loss, count = batch_loss(self.model, collate([self.examples[i] for i in indices], self.pad_token_id))
            torch.autograd.backward(loss / count)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item() / count)
            yield

    def evaluate(self, examples: Sequence[Example]) -> float:
        return _mean_loss(self.model, examples, self.pad_token_id, self.options.batch_size)


def schedule(step: int, steps: int, warmup_ratio: float) -> float:
    """The factor of the learning rates at a step: up over the warm-up, then down to zero after the last step."""
    warmup = math.ceil(steps * warmup_ratio)
    return (step + 1) / warmup if step < warmup else (steps - step) / max(steps - warmup, 1)


def evaluate_loss(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[Row | Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> float:
    """The loss in nats a labelled token over all rows (as in data files) of a causal LM, adapted or not.

    Raises `DataError` for a bad row.
    """
    located = [row if isinstance(row, Row) else Row(row, f"row {number}") for number, row in enumerate(rows, 1)]
    examples = [encode(row, tokenizer, max_length) for row in located]
    return _mean_loss(model, examples, _pad_token(tokenizer), batch_size)


@torch.no_grad()
def _mean_loss(model: nn.Module, examples: Sequence[Example], pad_token_id: int, batch_size: int) -> float:
    was_training = model.training
    model.eval()
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    total, count = 0.0, 0
    for first in range(0, len(ordered), batch_size):
        loss, labels = batch_loss(model, collate(ordered[first : first + batch_size], pad_token_id))
        total, count = total + loss.item(), count + labels
    model.train(was_training)
    return total / count


def batch_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """(Summed cross entropy, number of labels). Logits are made for labelled positions only, a chunk at a time."""
    causal = model.model if isinstance(model, VBLoRAModel) else model
    assert isinstance(causal, PreTrainedModel)
    batch = batch.to(causal.device)
    hidden = causal.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    labelled = batch.labels != -100
    return head_loss(causal, hidden[labelled], batch.labels[labelled]), int(labelled.sum())


def head_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy of the output layer on `hidden` (n, d) against `labels` (n,).

    Never holds more than a chunk of logits: each chunk's gradient with respect to its hidden states is taken at once,
    and handed to autograd as that of a linear function.
    """
    total = torch.zeros((), device=hidden.device)
    gradients = []
    for states, targets in zip(torch.split(hidden, HEAD_CHUNK), torch.split(labels, HEAD_CHUNK), strict=True):
        states = states.detach().requires_grad_(torch.is_grad_enabled())
        loss = F.cross_entropy(logits(model, states).float(), targets, reduction="sum")
        total += loss.detach()
        if states.requires_grad:
            gradients.append(torch.autograd.grad(loss, states)[0])
    if not gradients:
        return total
    linear = (hidden * torch.cat(gradients)).float().sum()
    return linear + (total - linear).detach()


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The logits of a causal LM from the last hidden states, with the scaling that its configuration asks for."""
    output_embeddings: Callable[[], nn.Module] = model.get_output_embeddings
    result: Tensor = output_embeddings()(hidden)
    scale, divisor, cap = (
        getattr(model.config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    result = result * scale if scale else result
    result = result / divisor if divisor else result
    return torch.tanh(result / cap) * cap if cap else result


def _pad_token(tokenizer: Any) -> int:
    """Padding is masked and never labelled: any token does."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return int(tokenizer.eos_token_id if pad is None else pad)


def _write_report(path: Path, config: VBLoRAConfig, options: TrainingOptions, report: TrainingReport) -> None:
    values = {"config": config.to_dict(), "options": asdict(options), "report": asdict(report)}
    write_atomically(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
