"""`vblora train` and `vblora train-bank`: from files of rows to adapters, with progress on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vblora.bank import VectorBank
from vblora.checkpoint import WEIGHTS_FILE
from vblora.cli.flags import TRAINING, flag, takes_config, takes_options
from vblora.config import VBLoRAConfig
from vblora.data import Row, read_rows
from vblora.errors import DataError
from vblora.loop import TrainingOptions
from vblora.record import can_plot
from vblora.session import Report

if TYPE_CHECKING:
    from vblora.integrations.base_models import BaseModel

_RECENT = 10  # steps that the shown loss is the mean of

Model = Annotated[str, typer.Option(help="Base model: hub id, folder, .gguf file or demo.")]
Dtype = Annotated[str, flag("Dtype of the base model: auto, float32, bfloat16 or float16.", TRAINING)]
Device = Annotated[str, flag("Device, like cpu or cuda.", TRAINING)]
ChatTemplate = Annotated[Path | None, flag("Jinja file for messages rows.", TRAINING)]
Resume = Annotated[bool, flag("Go on from the snapshot in --out.", TRAINING)]


@takes_config()
@takes_options
def train(
    model: Model,
    data: Annotated[Path, typer.Option(help="JSON lines: prompt and completion, or text, or messages.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    eval_data: Annotated[Path | None, flag("Held-out rows, in a file of their own.", TRAINING)] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    chat_template: ChatTemplate = None,
    bank: Annotated[Path | None, flag("Start from the bank in this file or adapter folder.", TRAINING)] = None,
    freeze_bank: Annotated[bool, flag("Never train the bank: logits only.", TRAINING)] = False,
    start: Annotated[Path | None, flag("Go on from the adapter in this folder.", TRAINING)] = None,
    resume: Resume = False,
    *,
    config: VBLoRAConfig,
    options: TrainingOptions,
) -> None:
    """Train an adapter on one customer's rows.

    Writes the adapter, training.json, losses.csv and, with matplotlib installed, losses.png.
    """
    rows = read_rows(data)
    eval_rows = read_rows(eval_data) if eval_data else None
    first_bank = VectorBank.load(bank) if bank else None
    base = _load(model, dtype, device, chat_template)

    from vblora.training import train as run  # transformers: slow to import, not for --help

    with _progress() as show:
        report = run(
            base, config, rows, out, options,
            eval_rows=eval_rows, bank=first_bank, freeze_bank=freeze_bank, start=start, resume=resume, on_step=show,
        )  # fmt: skip
    table = _summary()
    table.add_row("steps", f"{report.steps} over {report.rows} rows")
    if report.held_out_before is not None and report.held_out_after is not None:
        table.add_row(
            f"held-out loss, {report.held_out_rows} rows", _change(report.held_out_before, report.held_out_after)
        )
    table.add_row("adapter", _size(out))
    Console(emoji=False, markup=False).print(table)


@takes_config()
@takes_options
def train_bank(
    model: Model,
    data: Annotated[list[Path], typer.Option(help="One customer's JSON lines; give it again for each customer.")],
    out: Annotated[Path, typer.Option(help="Folder of the bank, and of each customer's adapter on it.")],
    dtype: Dtype = "auto",
    device: Device = "cpu",
    chat_template: ChatTemplate = None,
    resume: Resume = False,
    *,
    config: VBLoRAConfig,
    options: TrainingOptions,
) -> None:
    """Train one bank on the rows of several customers, for others to share.

    Customers take turns, a step each. Writes bank.safetensors, for `vblora train --bank … --freeze-bank`, and an
    adapter on it for each customer, named after its file up to the first dot.
    """
    customers = _customers(data)
    base = _load(model, dtype, device, chat_template)

    from vblora.bank_training import BANK_FILE
    from vblora.bank_training import train_bank as run  # transformers: slow to import, not for --help

    with _progress() as show:
        report = run(base, config, customers, out, options, resume=resume, on_step=show)
    table = _summary()
    table.add_row("steps", f"{report.steps} over {sum(report.rows.values())} rows of {len(customers)} customers")
    for name in report.held_out_after:
        change = _change(report.held_out_before[name], report.held_out_after[name])
        table.add_row(f"{name}: held-out loss, {report.held_out_rows[name]} rows", change)
    for name in customers:
        table.add_row(f"{name}: adapter", _size(out / name))
    table.add_row("bank", f"{out / BANK_FILE} ({(out / BANK_FILE).stat().st_size:,} bytes)")
    Console(emoji=False, markup=False).print(table)


def _customers(files: Sequence[Path]) -> dict[str, list[Row]]:
    """Rows by customer. Raises `DataError` for a bad file, or two of one customer."""
    customers: dict[str, list[Row]] = {}
    for file in files:
        name = file.name.partition(".")[0]
        if name in customers:
            raise DataError(f"{file}: a second file of customer {name!r}")
        customers[name] = read_rows(file)
    return customers


def _load(model: str, dtype: str, device: str, chat_template: Path | None) -> BaseModel:
    from vblora.integrations.base_models import load_base_model  # transformers: slow to import, not for --help

    console = Console(stderr=True, emoji=False, markup=False)
    if not can_plot():
        console.print("no losses.png: matplotlib is not installed; it comes with the extra train")
    return load_base_model(model, dtype=dtype, device=device, chat_template=chat_template, progress=console.print)


@contextmanager
def _progress() -> Iterator[Callable[[Report], None]]:
    """A progress bar on standard error, and what moves it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True, emoji=False, markup=False)) as progress:
        task = progress.add_task("training", total=None)

        def show(report: Report) -> None:
            recent = report.losses[-_RECENT:]
            loss = f"loss {sum(recent) / len(recent):.3f}" if recent else "training"
            progress.update(task, total=report.steps, completed=len(report.losses), description=loss)

        yield show


def _summary() -> Table:
    return Table(show_header=False, box=None)


def _change(before: float, after: float) -> str:
    return f"{before:.4f} → {after:.4f} nats a token"


def _size(adapter: Path) -> str:
    return f"{adapter} ({(adapter / WEIGHTS_FILE).stat().st_size:,} bytes)"
