"""Train one adapter on one base model, from rows to files. Knows no command lines or terminals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from vblora.bank import VectorBank
from vblora.checkpoint import content_hash, read_adapter, write_adapter
from vblora.config import VBLoRAConfig
from vblora.data import Row, encode, split
from vblora.errors import ConfigError
from vblora.inject import find_targets
from vblora.integrations.base_models import BaseModel
from vblora.loop import TrainingLoop, TrainingOptions
from vblora.loss import mean_loss, pad_token
from vblora.model import VBLoRAModel, get_vblora_model
from vblora.record import write_record
from vblora.registry import DEFAULT_NAME
from vblora.session import run_session
from vblora.snapshot import remove_snapshot

_SAME_AS_START = ("r", "num_vectors", "vector_length", "topk", "vblora_dropout", "bias", "modules_to_save")


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
    start: Path | None = None,
    resume: bool = False,
    on_step: Callable[[TrainingReport], None] = lambda report: None,
) -> TrainingReport:
    """Train an adapter and write it into `out`, with `training.json`, `losses.csv` and, where matplotlib is installed,
    `losses.png` beside it. Seeds torch's default random stream.

    Rows are held out of `rows` unless `eval_rows` are given. With `start`, the folder of an adapter with all its logits
    and of the same configuration, training begins where that one ended, on its bank. With `resume`, it goes on from
    the snapshot in `out`, to the same weights as without the interruption. `on_step` is called after every step, and
    once before. Raises `ConfigError`, `TargetError`, `DataError`, and `CheckpointError` for an adapter to start from
    that cannot be trained.
    """
    if freeze_bank and bank is None and start is None:
        raise ConfigError("freeze_bank needs a bank: a random one that is never trained would be of little use")
    if bank is not None and start is not None:
        raise ConfigError("bank: the adapter to start from brings its own; give one of the two")
    kept, held_out = split(rows, 0.0 if eval_rows is not None else options.eval_fraction, options.seed)
    examples = [encode(row, base.tokenizer, options.max_length) for row in kept]
    held_out_examples = [encode(row, base.tokenizer, options.max_length) for row in eval_rows or held_out]
    torch.manual_seed(options.seed)
    config = replace(config, task_type=config.task_type or "CAUSAL_LM", base_model_name_or_path=base.base_id)
    if start is None:
        model = get_vblora_model(base.model, config, bank=bank, freeze_bank=freeze_bank)
    else:
        model = _started(base, config, start, freeze_bank)
    given = asdict(options) | {"bank": bank and bank.hash, "freeze_bank": freeze_bank}
    given["start"] = start and content_hash(read_adapter(start))
    report = TrainingReport(options.steps(len(examples)), len(examples), len(held_out_examples))
    loop = TrainingLoop(model, {"default": examples}, pad_token(base.tokenizer), options)
    fingerprint = {"config": config.to_dict(), "options": given, "rows": [row.values for row in rows]}

    def evaluate() -> float | None:
        return mean_loss(model, held_out_examples, loop.pad_token_id, options.batch_size) if held_out_examples else None

    run_session(loop, report, out, fingerprint, evaluate=evaluate, resume=resume, on_step=on_step)
    write_adapter(out, model.checkpoint())
    write_record(out, model.peft_config["default"], given, asdict(report), {"loss": report.losses})
    remove_snapshot(out)
    return report


def _started(base: BaseModel, config: VBLoRAConfig, start: Path, freeze_bank: bool) -> VBLoRAModel:
    """The base model with the adapter in `start`, to be trained on and saved as `config` says."""
    model = VBLoRAModel.from_pretrained(base.model, start, is_trainable=True, freeze_bank=freeze_bank)
    found = model.peft_config[DEFAULT_NAME]
    for name in _SAME_AS_START:
        if getattr(found, name) != getattr(config, name):
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}, but {getattr(found, name)!r} in the adapter to start from"
            )
    if model.adapted_layers.keys() != find_targets(base.model, config).keys():
        raise ConfigError("target_modules: the adapter to start from has other targets")
    model.peft_config[DEFAULT_NAME] = replace(found, save_only_topk_weights=config.save_only_topk_weights)
    return model
