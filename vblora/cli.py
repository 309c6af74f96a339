"""The commands `vblora train` and `vblora inspect`. Knows flags and terminals; the work is done elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vblora.bank import VectorBank
from vblora.checkpoint import WEIGHTS_FILE, AdapterCheckpoint, bank_hash, content_hash, read_adapter
from vblora.config import PEFT_TYPE, VBLoRAConfig
from vblora.data import read_rows
from vblora.errors import VBLoRAError
from vblora.parameters import savable_parameters

if TYPE_CHECKING:
    from vblora.training import TrainingReport

app = typer.Typer(no_args_is_help=True, add_completion=False, help="VB-LoRA adapters: train and inspect them.")
_DEFAULTS = VBLoRAConfig()
_TRAINING = "Training"
_METHOD = "Adapter (VBLoRAConfig)"


def _flag(help_text: str, panel: str = _METHOD) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=help_text, rich_help_panel=panel)
    return option


@app.command()
def train(
    model: Annotated[str, typer.Option(help="Base model: hub id, folder, .gguf file or demo.")],
    data: Annotated[Path, typer.Option(help="JSON lines: prompt and completion, or text, or messages.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    eval_data: Annotated[Path | None, _flag("Held-out rows, in a file of their own.", _TRAINING)] = None,
    eval_fraction: Annotated[float, _flag("Share of the rows to hold out, without --eval-data.", _TRAINING)] = 0.05,
    epochs: Annotated[int, _flag("Passes over the data.", _TRAINING)] = 1,
    max_steps: Annotated[int | None, _flag("Optimizer steps, instead of --epochs.", _TRAINING)] = None,
    batch_size: Annotated[int, _flag("Rows a step.", _TRAINING)] = 8,
    logits_lr: Annotated[float, _flag("Learning rate of the logits.", _TRAINING)] = 1e-2,
    bank_lr: Annotated[float, _flag("Learning rate of the bank; short runs want a faster one.", _TRAINING)] = 1e-3,
    other_lr: Annotated[float, _flag("Learning rate of all else that is trained.", _TRAINING)] = 1e-3,
    warmup_ratio: Annotated[float, _flag("Share of the steps in which the rates climb.", _TRAINING)] = 0.05,
    max_length: Annotated[int, _flag("Tokens a row; longer ones are cut.", _TRAINING)] = 512,
    seed: Annotated[int, _flag("Seed of initialisation, order and dropout.", _TRAINING)] = 0,
    dtype: Annotated[str, _flag("Dtype of the base model: auto, float32, bfloat16 or float16.", _TRAINING)] = "auto",
    device: Annotated[str, _flag("Device, like cpu or cuda.", _TRAINING)] = "cpu",
    chat_template: Annotated[Path | None, _flag("Jinja file for messages rows.", _TRAINING)] = None,
    bank: Annotated[Path | None, _flag("Start from the bank in this file or adapter folder.", _TRAINING)] = None,
    freeze_bank: Annotated[bool, _flag("Never train the bank: logits only.", _TRAINING)] = False,
    save_steps: Annotated[int, _flag("Steps between snapshots to resume from; 0: none.", _TRAINING)] = 100,
    resume: Annotated[bool, _flag("Go on from the snapshot in --out.", _TRAINING)] = False,
    r: Annotated[int, _flag("Rank.")] = _DEFAULTS.r,
    num_vectors: Annotated[int, _flag("Vectors in the bank.")] = _DEFAULTS.num_vectors,
    vector_length: Annotated[int, _flag("Length of a vector; divides every target's sizes.")] = _DEFAULTS.vector_length,
    topk: Annotated[int, _flag("Vectors mixed into a sub-vector.")] = _DEFAULTS.topk,
    target_modules: Annotated[str | None, _flag("Names a,b,c; all-linear; or a regular expression.")] = None,
    exclude_modules: Annotated[str | None, _flag("Names a,b,c, or a regular expression.")] = None,
    save_only_topk_weights: Annotated[bool, _flag("Write the small form, for inference only.")] = False,
    vblora_dropout: Annotated[float, _flag("Dropout before A.")] = _DEFAULTS.vblora_dropout,
    fan_in_fan_out: Annotated[bool, _flag("Weights are stored (in, out).")] = False,
    bias: Annotated[str, _flag("Biases to train: none, all or vblora_only.")] = _DEFAULTS.bias,
    modules_to_save: Annotated[str | None, _flag("Modules to train as a whole: a,b,c.")] = None,
    init_vector_bank_bound: Annotated[float, _flag("Bank starts in ± this.")] = _DEFAULTS.init_vector_bank_bound,
    init_logits_std: Annotated[float, _flag("Logits start with this deviation.")] = _DEFAULTS.init_logits_std,
    layers_to_transform: Annotated[str | None, _flag("Layer indices: 0,1,2.")] = None,
    layers_pattern: Annotated[str | None, _flag("Name of the list of layers.")] = None,
) -> None:
    """Train an adapter."""
    given = dict(locals())
    config = VBLoRAConfig.from_dict({"peft_type": PEFT_TYPE, **_config_values(given)})
    console = Console(stderr=True, emoji=False, markup=False)
    rows = read_rows(data)
    eval_rows = read_rows(eval_data) if eval_data else None
    start = VectorBank.load(bank) if bank else None

    from vblora.integrations.base_models import load_base_model  # transformers: slow to import, not for --help
    from vblora.training import TrainingOptions
    from vblora.training import train as run

    options = TrainingOptions(**{name: given[name] for name in TrainingOptions.__dataclass_fields__})
    base = load_base_model(model, dtype=dtype, device=device, chat_template=chat_template, progress=console.print)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=None)

        def show(report: TrainingReport) -> None:
            loss = f"loss {_recent(report.losses):.3f}" if report.losses else "training"
            progress.update(task, total=report.steps, completed=len(report.losses), description=loss)

        report = run(
            base, config, rows, out, options,
            eval_rows=eval_rows, bank=start, freeze_bank=freeze_bank, resume=resume, on_step=show,
        )  # fmt: skip
    _summarise(report, out)


def _config_values(given: dict[str, object]) -> dict[str, object]:
    """The flags that are fields of `VBLoRAConfig`, lists taken apart at the commas."""
    values = {name: given[name] for name in _DEFAULTS.canonical() if name in given}
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"):
        values[name] = _listed(values[name], always=name in ("modules_to_save", "layers_to_transform"))
    layers = values["layers_to_transform"]
    if isinstance(layers, list):
        values["layers_to_transform"] = [int(index) if index.isdecimal() else index for index in layers]
    return values


def _listed(value: object, *, always: bool) -> object:
    """``a,b`` and plain names are lists; ``all-linear`` and what looks like a pattern stay strings."""
    if not isinstance(value, str) or value == "all-linear":
        return value
    is_pattern = not always and any(character in value for character in r"\*+?()[]{}|^$")
    return value if is_pattern else [part.strip() for part in value.split(",") if part.strip()]


def _recent(losses: list[float]) -> float:
    return sum(losses[-10:]) / len(losses[-10:])


def _summarise(report: TrainingReport, out: Path) -> None:
    table = Table(show_header=False, box=None)
    table.add_row("steps", f"{report.steps} over {report.rows} rows")
    if report.held_out_before is not None and report.held_out_after is not None:
        table.add_row(
            f"held-out loss, {report.held_out_rows} rows",
            f"{report.held_out_before:.4f} → {report.held_out_after:.4f} nats a token",
        )
    table.add_row("adapter", f"{out} ({(out / WEIGHTS_FILE).stat().st_size:,} bytes)")
    Console(emoji=False, markup=False).print(table)


@app.command()
def inspect(directory: Annotated[Path, typer.Argument(help="Folder of an adapter.")]) -> None:
    """Show an adapter's configuration, modules, sizes and hashes."""
    checkpoint = read_adapter(directory)
    size = (directory / WEIGHTS_FILE).stat().st_size
    for name, value in {**_facts(checkpoint), "file": f"{size:,} bytes", **checkpoint.config.to_dict()}.items():
        typer.echo(f"{name:<24} {value}")
    for path in checkpoint.modules:
        typer.echo(path)


def _facts(checkpoint: AdapterCheckpoint) -> dict[str, object]:
    own, others = savable_parameters(checkpoint)
    return {
        "content hash": content_hash(checkpoint),
        "bank hash": bank_hash(checkpoint.bank),
        "bank": f"{tuple(checkpoint.bank.shape)} {checkpoint.bank.dtype}",
        "modules": len(checkpoint.modules),
        "parameters": f"{own + others:,} (float32 equivalents)",
        "can be trained on": "yes" if checkpoint.trainable else "no: top-k metadata only",
    }


def main() -> None:
    """The console script: errors of the method become one line on standard error and exit status 1."""
    try:
        app()
    except VBLoRAError as error:
        Console(stderr=True, soft_wrap=True, emoji=False, markup=False, highlight=False).print(f"error: {error}")
        sys.exit(1)
