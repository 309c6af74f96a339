"""`vblora inspect`, `merge` and `export-lora`: what one does with an adapter that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vblora.checkpoint import WEIGHTS_FILE, AdapterCheckpoint, bank_hash, content_hash, read_adapter
from vblora.export import export_lora as export
from vblora.parameters import savable_parameters


def inspect(directory: Annotated[Path, typer.Argument(help="Folder of an adapter.")]) -> None:
    """Show an adapter's configuration, modules, sizes and hashes, and whether it can be trained on."""
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


def merge(
    model: Annotated[str, typer.Option(help="Base model: hub id, folder, .gguf file or demo.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model: a new one.")],
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Device to merge on, like cpu or cuda.")] = "cpu",
) -> None:
    """Fold an adapter into its base model, and write a model that needs no adapter, with its tokenizer."""
    from vblora.integrations.base_models import load_base_model, save_base_model  # slow to import, not for --help
    from vblora.model import VBLoRAModel

    console = Console(stderr=True, emoji=False, markup=False)
    read_adapter(adapter)  # what is wrong with it is said before the base model is loaded
    base = load_base_model(model, dtype=dtype, device=device, progress=console.print)
    adapted = VBLoRAModel.from_pretrained(base.model, adapter)
    adapted.merge_and_unload(progressbar=True, safe_merge=True)
    with console.status(f"writing {out}"):
        save_base_model(base, out)
    typer.echo(out)


def export_lora(
    directory: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    out: Annotated[Path, typer.Option(help="Folder of the LoRA.")],
) -> None:
    """Write an adapter as a PEFT LoRA that computes exactly the same, for tools that know only LoRA."""
    export(directory, out)
    before, after = ((folder / WEIGHTS_FILE).stat().st_size for folder in (directory, out))
    typer.echo(f"{out}: {after:,} bytes, from {before:,}")
