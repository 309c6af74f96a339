"""llama.cpp's side, run by the interpreter that has llama-cpp-python: a job is one JSON file, the result another.

Imports nothing of this repository. A job makes a bfloat16 GGUF of another (`source`, `target`), or names such a
`model`, LoRA files (none: no adapter), a prompt of token ids, and how many `rows` of `tokens` tokens to answer, one
after another: a context holds one set of adapters at a time.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

WARM_UP_TOKENS = 8


def to_bfloat16(source: str, target: str) -> None:
    """The same weights as `source`, of whatever quantisation, as bfloat16 matrices."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16
    parameters.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters):
        raise RuntimeError(f"llama.cpp could not convert {source}")


class Llama:
    """A model with its adapters loaded, and one context that answers one request at a time."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.model = llama_cpp.llama_model_load_from_file(job["model"].encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        for name, value in job["settings"].items():
            setattr(parameters, name, value)
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.adapters = [llama_cpp.llama_adapter_lora_init(self.model, path.encode()) for path in job["loras"]]
        if not self.model or not self.context or not all(self.adapters):
            raise RuntimeError("llama.cpp could not load the model, or an adapter")

    def answer(self, prompt: list[int], row: int, tokens: int) -> list[int]:
        """The greedy answer to request `row`, of whichever tokens; its adapter is put in first."""
        if self.adapters:
            chosen = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self.adapters[row % len(self.adapters)])
            if llama_cpp.llama_set_adapters_lora(self.context, chosen, 1, (ctypes.c_float * 1)(1.0)):
                raise RuntimeError("llama.cpp refused an adapter")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        answered: list[int] = []
        following = prompt
        while len(answered) < tokens:
            following = [self._next(following)]
            answered += following
        return answered

    def _next(self, tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)  # a batch points at it, and does not keep it
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not decode")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


def timed(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of whole requests, prompts and switches of adapters included, after a warm-up."""
    llama = Llama(job)
    llama.answer(job["prompt"], 0, WARM_UP_TOKENS)
    began = time.perf_counter()
    answers = [llama.answer(job["prompt"], row, job["tokens"]) for row in range(job["rows"])]
    seconds = time.perf_counter() - began
    names = {"llama-cpp-python": version("llama-cpp-python")}
    instructions = llama_cpp.llama_print_system_info().decode()
    return {"seconds": seconds, "answers": answers, "versions": names, "instructions": instructions}


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    result: dict[str, Any] = {}
    if "source" in job:
        to_bfloat16(job["source"], job["target"])
    else:
        result = timed(job)
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
