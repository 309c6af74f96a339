"""The command line `vblora`. Knows flags and terminals; the work is done in the modules beside this folder."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from vblora.cli.adapters import export_lora, inspect, merge
from vblora.cli.params import params
from vblora.cli.train import train, train_bank
from vblora.errors import VBLoRAError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="VB-LoRA adapters: how large one would be, training, looking at, merging and exporting them.",
)
for command in (params, train, train_bank, inspect, merge, export_lora):
    app.command()(command)


def main() -> None:
    """The console script: errors of the method become one line on standard error and exit status 1."""
    try:
        app()
    except VBLoRAError as error:
        Console(stderr=True, soft_wrap=True, emoji=False, markup=False, highlight=False).print(f"error: {error}")
        sys.exit(1)
