"""vLLM's own client against the server: `vllm bench serve` on the demo's adapters in turn, over both OpenAI routes.

Every request must succeed and get all its tokens. The requests come all at once; a figure of speed is for a client
and a server that share the processor's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bench_start import free_port, wait_for_memory, wait_until_ready
from benchmarks.peers.environment import QUIET, ROOT, SIDES
from benchmarks.workload import machine
from serving.demo import demo_adapters
from serving.demo.run import BASE_ID
from vblora.integrations.gguf_cache import converted, demo_source

ROUTES = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
KEPT = ("duration", "request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")


@contextmanager
def server(options: argparse.Namespace, folder: Path) -> Iterator[int]:
    """The port of a server on the demo model, ended with the block."""
    port = free_port()
    command = [sys.executable, "-m", "serving.cli", "run", "demo", "--dtype", options.dtype, "--port", str(port)]
    process = subprocess.Popen([*command, "--data-dir", str(folder / "data"), "--log-level", "error"])
    try:
        wait_until_ready(process, port)
        wait_for_memory(process)
        yield port
    finally:
        process.terminate()
        process.wait()


def arguments(options: argparse.Namespace, backend: str, port: int, result: Path) -> list[str]:
    """Those of `vllm bench serve`."""
    given = {
        "backend": backend, "base-url": f"http://127.0.0.1:{port}", "endpoint": ROUTES[backend], "model": BASE_ID,
        "tokenizer": converted(demo_source(), print), "dataset-name": "random", "random-input-len": options.input,
        "random-output-len": options.output, "num-prompts": options.requests, "lora-assignment": "round-robin",
        "result-dir": result.parent, "result-filename": result.name, "seed": 0,
    }  # fmt: skip
    named = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*named, "--ignore-eos", "--disable-tqdm", "--save-result", "--lora-modules", *demo_adapters()]


def run_client(options: argparse.Namespace, backend: str, port: int, result: Path) -> dict[str, Any]:
    """What vLLM's client wrote down; its log shows if a request failed or a token is missing."""
    interpreter = ROOT / "vllm" / "bin" / "python"
    if not interpreter.exists():
        raise SystemExit(f"vllm is not installed in {ROOT.name}/vllm: `make bench-peers` does that")
    command = [str(interpreter), str(SIDES / "vllm_bench.py"), *arguments(options, backend, port, result)]
    done = subprocess.run(
        command, env={**os.environ, **QUIET}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    wanted = {"completed": options.requests, "failed": 0, "total_output_tokens": options.requests * options.output}
    if any(found.get(name) != value for name, value in wanted.items()):
        raise SystemExit(f"{backend}: not {wanted}; the end of the client's log:\n{done.stdout[-6000:]}")
    return wanted | {name: found[name] for name in KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--input", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=16, help="tokens of an answer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, server(options, Path(name)) as port:
        found = {backend: run_client(options, backend, port, Path(name) / f"{backend}.json") for backend in ROUTES}
    print(json.dumps({"claim": "vllm bench serve", "backends": found, **machine()}))


if __name__ == "__main__":
    main()
