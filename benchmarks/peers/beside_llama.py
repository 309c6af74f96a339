"""llama.cpp with the settings that were fastest, and contests with it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoConfig

from benchmarks.contest import Contest, Run, contest_arguments, own_side
from benchmarks.peers.environment import run_job
from benchmarks.peers.exports import Exports, write_exports
from benchmarks.peers.gguf_files import join_parts, write_lora

CONTEXT = 512
MODEL_FILE = "bfloat16.gguf"


def settings() -> dict[str, Any]:
    """Fields of llama.cpp's `llama_context_params`; a cache of the whole context for windowed layers was slower."""
    cores = os.cpu_count() or 1
    return {"n_ctx": CONTEXT, "n_threads": cores, "n_threads_batch": cores, "swa_full": False}


def write_files(model: str, folder: Path, adapters: int) -> None:
    """The base model as a bfloat16 GGUF made from the file that ours was made from, and LoRAs beside their exports."""
    exports = write_exports(model, folder, adapters)
    exports.save(folder)
    source = join_parts(model, folder / "source.gguf")
    run_job("llama", {"source": source, "target": folder / MODEL_FILE})
    layers = AutoConfig.from_pretrained(exports.model).num_hidden_layers
    for lora in exports.loras:
        write_lora(lora, lora.with_suffix(".gguf"), gguf.MODEL_ARCH.GEMMA3, layers)


def in_turn(claim: str, module: str, description: str | None, rows: int, adapters: int) -> None:
    """Throughput of `rows` requests on as many adapters in one batch of ours, over llama.cpp's, one after another, on
    so many `adapters`, of which it loads all and puts in one a request."""

    def prepare(options: argparse.Namespace) -> None:
        write_files(options.model, options.folder, adapters)

    def llama(options: argparse.Namespace) -> Run:
        exports = Exports.load(options.folder)
        loras = [lora.with_suffix(".gguf") for lora in exports.loras]
        job = {"model": options.folder / MODEL_FILE, "prompt": exports.prompt, "loras": loras, "settings": settings()}
        found = run_job("llama", job | {"rows": options.rows, "tokens": options.tokens})
        about = {"settings": settings(), "versions": found["versions"], "instructions": found["instructions"]}
        return Run(found["seconds"], exports.prompt, found["answers"], about)

    sides = {"ours": own_side(rows), "llama": llama}
    contest = Contest(claim, module, sides, {"ours": rows, "llama": adapters}, prepare)
    contest.main(contest_arguments(description, rows))
