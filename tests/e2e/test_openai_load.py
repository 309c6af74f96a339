"""Many clients at once through the `openai` package: everything completes, and nothing stays behind."""

from __future__ import annotations

import asyncio
import time

import httpx
from openai import AsyncOpenAI

from serving.demo import demo_adapters
from tests.e2e.conftest import Server

REQUESTS = 100
GAUGES = ("requests_running", "requests_waiting", "batch_rows")


async def _stream(client: AsyncOpenAI, adapter: str, number: int) -> tuple[str, str, str, int]:
    """(adapter's header, text, finish reason, completion tokens) of one streaming request."""
    async with client.chat.completions.with_streaming_response.create(
        model=adapter,
        messages=[{"role": "user", "content": f"Place {number} is a coffee shop by the river."}],
        max_tokens=4 + number % 3,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as response:
        text, reason, tokens = "", "", 0
        async for chunk in await response.parse():
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
                reason = chunk.choices[0].finish_reason or reason
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
        return response.headers["X-VBLoRA-Adapter"], text, reason, tokens


def test_a_hundred_streams_over_four_adapters(server: Server) -> None:
    names = list(demo_adapters())
    adapters = [names[number % len(names)] for number in range(REQUESTS)]
    revisions = {
        entry["name"]: entry["active_revision"] for entry in httpx.get(f"{server.url}/v1/adapters").json()["data"]
    }

    async def run() -> list[tuple[str, str, str, int]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=200) as client:
            return await asyncio.gather(*(_stream(client, adapter, n) for n, adapter in enumerate(adapters)))

    for number, (adapter, result) in enumerate(zip(adapters, asyncio.run(run()), strict=True)):
        header, text, reason, tokens = result
        assert header == f"{adapter}@{revisions[adapter]}"
        assert text
        assert reason in {"stop", "length"}
        assert tokens <= 4 + number % 3
    _assert_idle(server, within=5)


def test_a_client_that_leaves_frees_its_row_within_a_second(server: Server) -> None:
    body = {"model": "gemma3-270m", "prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        assert any(line.startswith("data: {") for line in lines)
        assert server.gauge("requests_running") == 1
    _assert_idle(server, within=1)


def test_a_client_that_leaves_before_its_answer_frees_its_row_within_a_second(server: Server) -> None:
    body = {"model": "gemma3-270m", "prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True}
    try:
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(30, read=1.5))
    except httpx.ReadTimeout:
        pass
    else:
        raise AssertionError("4,000 tokens in 1.5 seconds: the test shows nothing on this machine")
    _assert_idle(server, within=1)


def _assert_idle(server: Server, within: float) -> None:
    deadline = time.monotonic() + within
    while busy := {name: value for name in GAUGES if (value := server.gauge(name))}:
        assert time.monotonic() < deadline, f"still {busy} after {within} s"
        time.sleep(0.05)
