"""P10: tokens a second that 32 clients stream over HTTP, against the engine called in the process.

The client is a raw one in this process, so that it takes little from the server on the same cores; how much processor
time both take for a token beyond the engine's is given too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks import sides
from benchmarks.bench_start import free_port, wait_for_memory, wait_until_ready
from benchmarks.workload import PROMPT, random_adapter, started_engine, throughput
from serving.types import EngineSettings
from vblora.checkpoint import write_adapter

DONE = b"data: [DONE]"


def in_process(options: argparse.Namespace) -> sides.Values:
    engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype))
    adapters = [engine.load_adapter(random_adapter(engine, seed)) for seed in range(options.rows)]
    found = throughput(engine, options.tokens, adapters, options.rows)
    engine.close()
    return {"process": found}


def over_http(options: argparse.Namespace) -> sides.Values:
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "serving.cli", "run", options.model, "--dtype", options.dtype]
        command += ["--port", str(port), "--data-dir", str(folder / "data"), "--log-level", "error"]
        for number, path in enumerate(_adapters(options, folder)):
            command += ["--adapter", f"a{number}={path}"]
        server = subprocess.Popen(command)
        try:
            wait_until_ready(server, port)
            wait_for_memory(server)
            asyncio.run(_stream_all(port, options.rows, 2))
            began = time.perf_counter()
            tokens = asyncio.run(_stream_all(port, options.rows, options.tokens))
            seconds = time.perf_counter() - began
        finally:
            server.terminate()
            server.wait()
    assert tokens == options.rows * options.tokens, f"{tokens} tokens came"
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"http": tokens / seconds, "client_seconds": used.ru_utime + used.ru_stime}


def _adapters(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Written by a process of its own, whose memory is gone before the server starts."""
    code = (
        "import sys; from benchmarks.bench_streaming import write_adapters; "
        f"write_adapters({options.model!r}, {options.dtype!r}, {options.rows}, {str(folder)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    return [folder / f"adapter{seed}" for seed in range(options.rows)]


def write_adapters(model: str, dtype: str, count: int, folder: str) -> None:
    engine = started_engine(EngineSettings(model=model, dtype=dtype))
    for seed in range(count):
        write_adapter(Path(folder) / f"adapter{seed}", random_adapter(engine, seed))
    engine.close()


async def _stream_all(port: int, rows: int, tokens: int) -> int:
    """The number of tokens that `rows` concurrent streams were told of."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        base = (await client.get("/v1/models")).json()["data"][0]["id"]
    streams = (_stream(port, base, f"a{row}", tokens) for row in range(rows))
    return sum(await asyncio.gather(*streams))


async def _stream(port: int, base: str, adapter: str, tokens: int) -> int:
    """One request over a socket, its answer read line by line; the usage at the end says how many tokens there were."""
    body = json.dumps({
        "model": base, "adapter_id": adapter, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    last = b""
    while line := await reader.readline():
        if line.startswith(DONE):
            break
        if line.startswith(b"data: "):
            last = line
    writer.close()
    generated: int = json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"]
    return generated


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    return in_process(options) if side == "process" else over_http(options)


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    sides.main("P10", "benchmarks.bench_streaming", parser, measure, ("http", "process"), ("http", "process"))


if __name__ == "__main__":
    main()
