"""How well each adapter knows each task: held-out loss of every task's text, on the base model and on every adapter.

    python examples/heldout_table.py DATA [--adapters FOLDER] [--model demo] [--rows 100]

reads DATA/<task>.heldout.jsonl and FOLDER/<task>/ for the tasks it finds in FOLDER (the shipped adapters unless
given), and prints a Markdown table in nats a token. Exits with 1 unless each task's own adapter is the best of its row
and at least 25 % below the base model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from serving.demo import ADAPTERS
from vblora import VBLoRAModel
from vblora.data import read_rows
from vblora.integrations.base_models import BaseModel, load_base_model
from vblora.training import evaluate_loss

BASE = "base"
MARGIN = 0.75


def measure(base: BaseModel, adapters: Path, data: Path, rows: int) -> dict[str, dict[str, float]]:
    """task → column → nats a token; the columns are the base model and every adapter, in alphabetical order."""
    names = sorted(path.parent.name for path in adapters.glob("*/adapter_config.json"))
    model = VBLoRAModel.from_pretrained(base.model, adapters / names[0], names[0])
    for name in names[1:]:
        model.load_adapter(adapters / name, name)
    table: dict[str, dict[str, float]] = {}
    for task in names:
        held_out = read_rows(data / f"{task}.heldout.jsonl")[:rows]
        with model.disable_adapter():
            table[task] = {BASE: evaluate_loss(model, base.tokenizer, held_out)}
        for name in names:
            model.set_adapter(name, inference_mode=True)
            table[task][name] = evaluate_loss(model, base.tokenizer, held_out)
    return table


def markdown(table: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each task, its smallest figure in bold."""
    columns = [BASE, *table]
    lines = [f"| held-out text of | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for task, losses in table.items():
        best = min(losses.values())
        cells = [f"**{losses[name]:.3f}**" if losses[name] == best else f"{losses[name]:.3f}" for name in columns]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shortcomings(table: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The tasks whose own adapter is not the best of its row, or not well below the base model."""
    return [
        task
        for task, losses in table.items()
        if losses[task] > min(losses.values()) or losses[task] > MARGIN * losses[BASE]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Held-out loss of every task on every adapter.")
    parser.add_argument("data", type=Path, help="the folder with <task>.heldout.jsonl")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="the folder of the adapters' folders")
    parser.add_argument("--model", default="demo", help="the base model (default demo)")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows a task (default 100)")
    arguments = parser.parse_args()
    table = measure(load_base_model(arguments.model), arguments.adapters, arguments.data, arguments.rows)
    print(markdown(table))
    if short := shortcomings(table):
        print(f"not good enough: {', '.join(short)}", file=sys.stderr)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
