"""`vblora-serve demo`: a real server, the same questions to every demo adapter at once, the answers side by side.

It knows the server only from outside: its command line and its HTTP routes.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serving.demo import CUSTOMERS, demo_adapters
from vblora import VBLoRAError, read_adapter
from vblora.checkpoint import TopKModule
from vblora.integrations.gguf_cache import converted, demo_source

HOST = "127.0.0.1"
BASE_ID = "gemma3-270m"
BASE = "base"
QUESTIONS = (
    "Our train was cancelled and we waited for two hours in the rain.",
    "The parcel never came and I waited at home all day.",
    "I ordered a blue lamp and you sent me a green one.",
)
MAX_TOKENS = 64
POLL_SECONDS = 0.2
STOP_SECONDS = 40.0
INTERRUPTED = 130


class DemoError(Exception):
    """The demo cannot go on; the message is for the person who started it."""


@dataclass(frozen=True)
class Answer:
    """What one model said to one question, and how many tokens that took. A `cut` one did not end by itself."""

    adapter: str
    question: str
    text: str
    tokens: int
    cut: bool


def run_demo(*, once: bool = False, port: int = 8000, console: Console | None = None) -> int:
    """Start the server, show the answers, then serve until interrupted (or end at once). Returns the exit status."""
    console = console or Console(emoji=False, markup=False)
    try:
        _check_port(port)
        converted(demo_source(), console.print)  # a minute or two the first time: show its progress
        with _server(port) as server:
            _wait_until_ready(server, port)
            _show(console, *asyncio.run(_ask_all(port)))
            if once:
                return 0
            console.print(f"\nServing on http://{HOST}:{port} until Ctrl-C. The README has commands to try.")
            return _serve(server)
    except (DemoError, VBLoRAError) as error:
        Console(stderr=True).print(Text(f"demo: {error}"))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise DemoError(f"port {port} is in use: stop what listens there, or choose another with --port") from error


@contextmanager
def _server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The server as a child process, ended with the block whatever happens. It drains on the first signal."""
    command = [sys.executable, "-m", "serving.cli", "run", "demo", "--host", HOST, "--port", str(port)]
    server = subprocess.Popen([*command, "--log-level", "warning"])
    previous = signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        yield server
    finally:
        signal.signal(signal.SIGTERM, previous)
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Loading takes as long as the machine needs: only a dead server ends the wait."""
    while True:
        if (status := server.poll()) is not None:
            raise DemoError(f"the server ended with status {status} before it was ready; its messages are above")
        try:
            if httpx.get(f"http://{HOST}:{port}/health/ready", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(POLL_SECONDS)


def _serve(server: subprocess.Popen[bytes]) -> int:
    """Wait for the server's end. Ctrl-C reaches it too, for it is in the terminal's process group."""
    try:
        return server.wait()
    except KeyboardInterrupt:
        pass
    try:
        return server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"the server did not end within {STOP_SECONDS:.0f} s") from error


async def _ask_all(port: int) -> tuple[list[Answer], float]:
    """Every question to every model, all at once, and the seconds until the last answer."""
    models = [BASE, *demo_adapters()]
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=None, trust_env=False) as client:
        started = time.perf_counter()
        answers = await asyncio.gather(*(_ask(client, model, text) for text in QUESTIONS for model in models))
        return list(answers), time.perf_counter() - started


async def _ask(client: httpx.AsyncClient, adapter: str, question: str) -> Answer:
    body = {
        "model": BASE_ID,
        "adapter_id": adapter,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    try:
        reply = await client.post("/v1/chat/completions", json=body)
    except httpx.TransportError as error:
        raise DemoError(f"the server went away while it answered: {error!r}") from error
    if reply.status_code != 200:
        raise DemoError(f"the server answered {reply.status_code} for {adapter}: {reply.text}")
    result = reply.json()
    choice = result["choices"][0]
    text, cut = choice["message"]["content"].strip(), choice["finish_reason"] == "length"
    return Answer(adapter, question, text, result["usage"]["completion_tokens"], cut)


def _show(console: Console, answers: Sequence[Answer], seconds: float) -> None:
    said = {(answer.adapter, answer.question): answer.text + " …" * answer.cut for answer in answers}
    table = Table(title="The same questions, one batch", show_lines=True)
    table.add_column("asked of", ratio=2)
    for question in QUESTIONS:
        table.add_column(Text(question), ratio=3, overflow="fold")
    for model in [BASE, *demo_adapters()]:
        who = Text.assemble((model, "bold"), "\n", CUSTOMERS.get(model, "the base model alone"))
        table.add_row(who, *(Text(said[model, question]) for question in QUESTIONS))
    console.print(table)
    tokens = sum(answer.tokens for answer in answers)
    console.print(
        f"{len(answers)} requests of {len(said) // len(QUESTIONS)} models in one batch: "
        f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens a second\n"
    )
    console.print(_sizes())


def _sizes() -> Table:
    """Bytes of each shipped adapter's weights beside those of a LoRA of the same rank on the same linears."""
    table = Table(title="Bytes of an adapter")
    for heading in ("adapter", "rank", "VB-LoRA file", "LoRA, float32", "LoRA, bfloat16"):
        table.add_column(heading, justify="left" if heading == "adapter" else "right")
    for name, folder in demo_adapters().items():
        rank, parameters = _lora_parameters(folder)
        size = (folder / "adapter_model.safetensors").stat().st_size
        table.add_row(name, str(rank), f"{size:,}", f"{4 * parameters:,}", f"{2 * parameters:,}")
    return table


def _lora_parameters(folder: Path) -> tuple[int, int]:
    """(rank, entries of all A and B): each sub-vector of the adapter stands for `vector_length` of them."""
    checkpoint = read_adapter(folder).topk()
    modules = [module for module in checkpoint.modules.values() if isinstance(module, TopKModule)]
    metadata = sum(module.a.indices.numel() + module.b.indices.numel() for module in modules)
    return checkpoint.config.r, metadata // checkpoint.config.topk * checkpoint.config.vector_length
