"""One customer, three ways: a LoRA, a VB-LoRA with a bank of its own, and one on a frozen bank shared by all four.

    python -m examples.customers.compare lora NAME --out FOLDER --seed N --steps N [--model demo]
    python -m examples.customers.compare table --lora FOLDER --shared FOLDER [--own FOLDER] [--model demo] [--rows N]

`lora` trains a LoRA with PEFT, on the rows, batches and schedule that `vblora train` has for the same seed and steps.
`table` prints, for every customer that it finds in all three folders, the held-out loss in nats a token and, for each
way, the bytes of the stored weights and the trainable parameters; then a line of JSON. `compare.sh` is what runs both.
All in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
from torch import nn

from serving.demo import ADAPTERS
from vblora import VBLoRAModel, read_adapter
from vblora.checkpoint import WEIGHTS_FILE
from vblora.data import encode, read_rows
from vblora.inject import find_targets
from vblora.integrations.base_models import BaseModel, load_base_model
from vblora.loop import TrainingLoop, TrainingOptions
from vblora.loss import evaluate_loss, pad_token
from vblora.parameters import count_parameters

DATA = Path(__file__).parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 4


@dataclass(frozen=True)
class Way:
    """One way for one customer. `bytes` are of the adapter's file; a shared bank, kept once, is not in it."""

    loss: float
    bytes: int
    trained: int


def train_lora(base: BaseModel, customer: str, out: Path, seed: int, steps: int) -> list[float]:
    """Train a LoRA of `RANK` on all linears and save it; returns the losses. Its rate is 1e-3, its alpha PEFT's own."""
    options = TrainingOptions(max_steps=steps, seed=seed, other_lr=1e-3)
    rows = read_rows(DATA / f"{customer}.train.jsonl")
    examples = [encode(row, base.tokenizer, options.max_length) for row in rows]
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(
        base.model, peft.LoraConfig(r=RANK, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.0)
    )
    losses: list[float] = []
    for _ in TrainingLoop(base.model, {customer: examples}, pad_token(base.tokenizer), options).run(steps, losses):
        pass
    adapted.save_pretrained(str(out))
    return losses


def held_out_loss(model: nn.Module, base: BaseModel, customer: str, rows: int | None) -> float:
    return evaluate_loss(model, base.tokenizer, read_rows(DATA / f"{customer}.heldout.jsonl")[:rows])


def measure_lora(base: BaseModel, customer: str, folder: Path, rows: int | None) -> Way:
    adapted = peft.PeftModel.from_pretrained(base.model, folder)
    loss = held_out_loss(base.model, base, customer, rows)
    trained = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    adapted.unload()
    return Way(loss, (folder / WEIGHTS_FILE).stat().st_size, trained)


def measure_vblora(base: BaseModel, customer: str, folder: Path, rows: int | None, *, shared: bool) -> Way:
    config = read_adapter(folder).config
    counts = count_parameters(config, find_targets(base.model, config).values())
    adapted = VBLoRAModel.from_pretrained(base.model, folder)
    loss = held_out_loss(adapted, base, customer, rows)
    adapted.unload()
    bank = config.num_vectors * config.vector_length
    size = (folder / WEIGHTS_FILE).stat().st_size
    return Way(loss, size - 4 * bank if shared else size, counts.trainable - bank if shared else counts.trainable)


def measure(base: BaseModel, own: Path, shared: Path, lora: Path, rows: int | None) -> dict[str, dict[str, Way]]:
    """Every way of every customer that is in all three folders."""
    customers = sorted(path.name for path in own.iterdir() if (path / WEIGHTS_FILE).exists())
    return {
        customer: {
            "LoRA": measure_lora(base, customer, lora / customer, rows),
            "own bank": measure_vblora(base, customer, own / customer, rows, shared=False),
            "shared bank": measure_vblora(base, customer, shared / customer, rows, shared=True),
        }
        for customer in customers
        if (lora / customer / WEIGHTS_FILE).exists() and (shared / customer / WEIGHTS_FILE).exists()
    }


def markdown(found: dict[str, dict[str, Way]]) -> str:
    """A row a customer, and two of sizes, which are the same for all of them."""
    ways = list(next(iter(found.values())))
    lines = ["| held-out text of | " + " | ".join(ways) + " | shared against own |", "|---" * (len(ways) + 2) + "|"]
    for customer, losses in found.items():
        change = losses["shared bank"].loss / losses["own bank"].loss - 1
        cells = " | ".join(f"{losses[way].loss:.3f}" for way in ways)
        lines.append(f"| {customer} | {cells} | {change:+.1%} |")
    for title, field in (("stored bytes", "bytes"), ("trained parameters", "trained")):
        sizes = {way: sorted({getattr(losses[way], field) for losses in found.values()}) for way in ways}
        cells = " | ".join("–".join(f"{size:,}" for size in sizes[way]) for way in ways)
        lines.append(f"| {title} | {cells} | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    training, table = commands.add_parser("lora"), commands.add_parser("table")
    for command in (training, table):
        command.add_argument("--model", default="demo")
    training.add_argument("customer")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--seed", type=int, required=True)
    training.add_argument("--steps", type=int, required=True)
    table.add_argument("--own", type=Path, default=ADAPTERS)
    table.add_argument("--lora", type=Path, required=True)
    table.add_argument("--shared", type=Path, required=True)
    table.add_argument("--rows", type=int)
    given = parser.parse_args(arguments)
    base = load_base_model(given.model, dtype="float32")
    if given.command == "lora":
        losses = train_lora(base, given.customer, given.out, given.seed, given.steps)
        print(f"{given.customer}: {losses[0]:.4f} → {losses[-1]:.4f} nats a token in {given.steps} steps")
        return
    found = measure(base, given.own, given.shared, given.lora, given.rows)
    print(markdown(found))
    print(json.dumps({name: {way: asdict(value) for way, value in ways.items()} for name, ways in found.items()}))


if __name__ == "__main__":
    main()
