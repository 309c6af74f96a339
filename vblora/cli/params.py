"""`vblora params`: how large an adapter would be, before there is one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vblora.cli.flags import takes_config
from vblora.config import VBLoRAConfig
from vblora.inject import find_targets, fitting_lengths
from vblora.mixture import ModuleShape
from vblora.parameters import count_parameters

_LEAST_LENGTH = 8  # shorter vectors than these are of no use to anybody
_BYTES = 4


@takes_config(
    without=("vector_length", "save_only_topk_weights", "vblora_dropout", "init_vector_bank_bound", "init_logits_std")
)
def params(
    model: Annotated[str, typer.Argument(help="Base model: hub id, folder, .gguf file or demo. No weights are read.")],
    task_type: Annotated[str, typer.Option(help="CAUSAL_LM, SEQ_CLS, TOKEN_CLS or QUESTION_ANS.")] = "CAUSAL_LM",
    *,
    config: VBLoRAConfig,
) -> None:
    """Count an adapter's parameters and bytes for each vector length that fits the model, beside a LoRA's."""
    from vblora.integrations.base_models import model_on_meta  # transformers: slow to import, not for --help

    console = Console(stderr=True, emoji=False, markup=False)
    config = replace(config, vector_length=1, task_type=task_type)
    shapes = find_targets(model_on_meta(model, task_type, progress=console.print), config).values()
    lengths = [length for length in fitting_lengths(shapes) if length >= _LEAST_LENGTH] or fitting_lengths(shapes)
    title = f"{len(shapes)} modules, r {config.r}, num_vectors {config.num_vectors}, topk {config.topk}"
    Console(emoji=False, markup=False).print(_table(title, config, lengths, shapes))


def _table(title: str, config: VBLoRAConfig, lengths: list[int], shapes: Collection[ModuleShape]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("vector_length", "sub-vectors", "trained", "file, full", "file, top-k only"):
        table.add_column(column, justify="right")
    for length in lengths:
        counts = count_parameters(replace(config, vector_length=length), shapes)
        table.add_row(
            f"{length:,}", f"{counts.sub_vectors:,}", f"{counts.trainable:,}",
            f"{_BYTES * counts.full:,} bytes", f"{_BYTES * counts.topk_only:,} bytes",
        )  # fmt: skip
    lora = count_parameters(config, shapes).lora
    table.add_row("LoRA", "", f"{lora:,}", f"{_BYTES * lora:,} bytes", "")
    return table
