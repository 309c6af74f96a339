"""vLLM on a CPU, with the settings that were fastest, and its side of a contest."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.contest import Contest, Run, contest_arguments, own_side
from benchmarks.peers.environment import ROOT, run_job
from benchmarks.peers.exports import Exports, write_exports

PRELOADED = (Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"), ROOT / "vllm" / "lib" / "libiomp5.so")
"""Debian's tcmalloc and Intel's OpenMP, which comes with vLLM: as its manual says, where they are installed."""

SMALLEST_RANK = 8  # of the values that vLLM takes for max_lora_rank, the least that holds rank 4


def variables() -> dict[str, str]:
    """The environment: a thread for each core, and the preloaded libraries."""
    cores = f"0-{(os.cpu_count() or 1) - 1}"
    preload = ":".join(str(library) for library in PRELOADED if library.exists())
    return {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "2", "LD_PRELOAD": preload}


def settings(rows: int, adapters: int) -> dict[str, Any]:
    """The keywords of `vllm.LLM` for so many requests at once on so many distinct adapters."""
    batch = {"max_num_seqs": rows, "max_model_len": 512}
    return batch | ({"enable_lora": True, "max_loras": adapters, "max_lora_rank": SMALLEST_RANK} if adapters else {})


def run_vllm(exports: Exports, given: Mapping[str, Any], **measured: Any) -> dict[str, Any]:
    """What `vllm_side.py` finds, with what it ran with as `about`."""
    job = {"model": exports.model, "prompt": exports.prompt, "loras": exports.loras, "settings": given} | measured
    result = run_job("vllm", job, variables())
    preloaded = [library.name for library in PRELOADED if library.exists()]
    return result | {"about": {"settings": given, "preloaded": preloaded, "versions": result["versions"]}}


def distinct_adapters(claim: str, module: str, description: str | None, rows: int) -> None:
    """Throughput of `rows` requests on as many distinct adapters, ours over vLLM's."""

    def prepare(options: argparse.Namespace) -> None:
        write_exports(options.model, options.folder, rows).save(options.folder)

    def vllm(options: argparse.Namespace) -> Run:
        exports = Exports.load(options.folder)
        found = run_vllm(exports, settings(options.rows, rows), cases=[(options.rows, rows)], tokens=options.tokens)
        return Run(found["cases"][0]["seconds"], exports.prompt, found["cases"][0]["answers"], found["about"])

    sides = {"ours": own_side(rows), "vllm": vllm}
    contest = Contest(claim, module, sides, dict.fromkeys(sides, rows), prepare)
    contest.main(contest_arguments(description, rows))
