"""P8, own side: seconds to bring a resident adapter into a slot, against PEFT loading a LoRA of the same rank.

Ours is what the engine reports while it serves requests of adapters that are in no slot yet. The LoRA is the exact
export of such an adapter; PEFT reads it from a file that the system has cached, and puts it into the model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from peft import PeftModel

from benchmarks import sides
from benchmarks.workload import Recorder, cheap_adapters, random_adapter, requests, started_engine
from serving.types import EngineSettings
from vblora.checkpoint import write_adapter
from vblora.export import export_lora
from vblora.integrations.base_models import load_base_model


def slot_seconds(options: argparse.Namespace) -> float:
    recorder = Recorder()
    engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype), observer=recorder)
    adapters = cheap_adapters(engine, options.adapters)
    engine.generate(requests(engine, len(adapters), 2, adapters))
    engine.close()
    return statistics.median(recorder.compositions)


def lora_seconds(options: argparse.Namespace) -> float:
    engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype))
    adapter = random_adapter(engine, 0)
    engine.close()
    base = load_base_model(options.model, dtype=options.dtype).model
    with tempfile.TemporaryDirectory() as folder:
        own, lora = Path(folder) / "own", Path(folder) / "lora"
        write_adapter(own, adapter)
        export_lora(own, lora)
        model = PeftModel.from_pretrained(base, lora, "first")
        times = []
        for number in range(options.loads):
            began = time.perf_counter()
            model.load_adapter(str(lora), f"adapter{number}")
            model.set_adapter(f"adapter{number}")
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    return {side: slot_seconds(options) if side == "slot" else lora_seconds(options)}


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--adapters", type=int, default=256)
    parser.add_argument("--loads", type=int, default=9)
    sides.main("P8", "benchmarks.bench_hot_switch", parser, measure, ("lora", "slot"), ("slot", "lora"))


if __name__ == "__main__":
    main()
