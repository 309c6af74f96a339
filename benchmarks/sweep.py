"""Throughput over batch sizes and numbers of distinct adapters, ours and vLLM's: figures as JSON, and a plot.

One process of ours, and two of vLLM's: with LoRA for adapters, without it for none, each at its fastest. Every case is
whole requests of workload W, all at once, after a warm-up; a case is measured once, so that neighbours tell the noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contest import PREPARE
from benchmarks.peers.beside_vllm import run_vllm, settings
from benchmarks.peers.exports import Exports, write_exports
from benchmarks.sides import fresh_process
from benchmarks.workload import machine, random_adapter, started_engine, throughput
from serving.types import EngineSettings

HERE = Path(__file__).parent
BATCHES = (1, 2, 4, 8, 16, 32, 64)
ADAPTERS = (0, 1, 4, 16, 64)
CASES = [(rows, distinct) for distinct in ADAPTERS for rows in BATCHES if distinct <= rows]
"""Of (requests, distinct adapters)."""

Figures = list[tuple[int, int, float]]
"""Requests, distinct adapters, tokens a second."""


def ours(options: argparse.Namespace) -> Figures:
    given = EngineSettings(model=options.model, dtype=options.dtype, max_batch_size=max(BATCHES))
    engine = started_engine(given)
    adapters = [engine.load_adapter(random_adapter(engine, seed)) for seed in range(max(ADAPTERS))]
    found = [
        (rows, distinct, throughput(engine, options.tokens, adapters[:distinct], rows)) for rows, distinct in CASES
    ]
    engine.close()
    return found


def vllm(options: argparse.Namespace, with_lora: bool) -> dict[str, Any]:
    """Figures of the cases with adapters, or of those without, and what vLLM ran with."""
    cases = [case for case in CASES if bool(case[1]) == with_lora]
    given = settings(max(BATCHES), max(distinct for _, distinct in cases))
    found = run_vllm(Exports.load(options.folder), given, cases=cases, tokens=options.tokens)
    rates = [sum(map(len, case["answers"])) / case["seconds"] for case in found["cases"]]
    return {"figures": [(*case, rate) for case, rate in zip(cases, rates, strict=True)], "about": found["about"]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What one process does: a side's figures, or the files that vLLM reads."""
    if options.side == "ours":
        return {"figures": ours(options)}
    if options.side == PREPARE:
        write_exports(options.model, options.folder, max(ADAPTERS)).save(options.folder)
        return {}
    return vllm(options, with_lora=options.side == "vllm_lora")


def plot(found: dict[str, Figures], target: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(9, 4), sharey=True, layout="constrained")
    for panel, (side, figures) in zip(panels, found.items(), strict=True):
        for distinct in ADAPTERS:
            line = [(rows, rate) for rows, adapters, rate in figures if adapters == distinct]
            label = {0: "no adapter", 1: "1 adapter"}.get(distinct, f"{distinct} adapters")
            panel.plot(*zip(*line, strict=True), marker="o", markersize=4, label=label)
        panel.set(
            title={"ours": "this server", "vllm": "vLLM for CPU, LoRA of rank 4"}[side], xlabel="requests at once"
        )
        panel.set_xscale("log", base=2)
        panel.set_xticks(BATCHES, map(str, BATCHES))
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="tokens a second", ylim=(0, None))
    panels[0].legend()
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        ran = {
            side: fresh_process("benchmarks.sweep", *sys.argv[1:], "--side", side, "--folder", folder)
            for side in (PREPARE, "ours", "vllm", "vllm_lora")
        }
    found = {"ours": ran["ours"]["figures"], "vllm": ran["vllm"]["figures"] + ran["vllm_lora"]["figures"]}
    about = {side: ran[side]["about"] for side in ("vllm", "vllm_lora")}
    columns = ["requests", "adapters", "tokens a second"]
    line = json.dumps({"columns": columns, "tokens": options.tokens, **found, "about": about, **machine()})
    (HERE / "sweep.json").write_text(line + "\n")
    plot(found, HERE / "sweep.png")
    print(line)


if __name__ == "__main__":
    main()
