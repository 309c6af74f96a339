"""--quantization int8 against bfloat16: throughput with an adapter for each request, and the loss on held-out text.

The loss is that of the demo's customers' held-out rows, each with its shipped adapter, in nats a token: the base's
linear layers in 8-bit integers as the engine has them, the adapter's deltas in full.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

import serving.demo
from benchmarks import sides
from benchmarks.workload import random_adapter, started_engine, throughput
from serving.engine.linears import PackedLinear
from serving.engine.quantization import Int8Product
from serving.types import EngineSettings
from vblora import VBLoRAModel
from vblora.data import read_rows
from vblora.integrations.base_models import load_base_model
from vblora.loss import evaluate_loss

ADAPTERS = Path(serving.demo.__file__).parent / "adapters"
ROWS = Path(__file__).parents[1] / "examples" / "customers"
BATCHES = (1, 8, 32)
QUANTIZATION = {"bfloat16": None, "int8": "int8"}


def speeds(options: argparse.Namespace, side: str) -> sides.Values:
    settings = EngineSettings(model=options.model, dtype="bfloat16", quantization=QUANTIZATION[side])
    engine = started_engine(settings)
    adapters = [engine.load_adapter(random_adapter(engine, seed)) for seed in range(max(BATCHES))]
    values = {f"{side}_{rows}": throughput(engine, options.tokens, adapters[:rows], rows) for rows in BATCHES}
    engine.close()
    return values


def losses(options: argparse.Namespace, side: str) -> sides.Values:
    values = {}
    for adapter in sorted(path.parent for path in ADAPTERS.glob("*/adapter_config.json")):
        base = load_base_model(options.model, dtype="bfloat16")
        model = VBLoRAModel.from_pretrained(base.model, adapter)
        if QUANTIZATION[side]:
            quantise(base.model)
        rows = read_rows(ROWS / f"{adapter.name}.heldout.jsonl")[: options.rows]
        values[f"{side}_{adapter.name}_nats"] = evaluate_loss(model, base.tokenizer, rows)
    return values


def quantise(model: nn.Module) -> None:
    """Put 8-bit layers in the places of all plain linear layers, those within adapted ones included."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(module, Int8Product))


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    return speeds(options, side) | losses(options, side)


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=40, help="held-out rows a customer")
    sides.main("int8", "benchmarks.bench_int8", parser, measure, ("int8_1", "bfloat16_1"), ("bfloat16", "int8"))


if __name__ == "__main__":
    main()
