"""The server as a process: a hundred clients at once, the end by a signal, and starts that are refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.integration.api.conftest import BASE, Files

START_SECONDS = 90
LOADED_MACHINE_SECONDS = 3  # the promise is the timeout + 2 s; ending an interpreter takes longer beside other work


@dataclass(frozen=True)
class Process:
    """A started `vblora-serve run`, ready to answer."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def end(self, within: float) -> tuple[int, float]:
        """Wait for its end: the exit status, and the seconds it took."""
        started = time.monotonic()
        return self.process.wait(within), time.monotonic() - started


def environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VBLORA_")}
    return clean | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "serving.cli", *arguments]


@contextmanager
def serving(files: Files, folder: Path, *arguments: str) -> Iterator[Process]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = [part for number in range(4) for part in ("--adapter", f"a{number}={files.adapter(number)}")]
    log = folder / "log"
    with log.open("wb") as output:
        line = command("run", str(files.model), "--port", port, "--data-dir", str(folder / "data"), *shared, *arguments)
        line += ["--kv-cache-memory", "64MiB"]
        process = subprocess.Popen(line, stdout=output, stderr=output, env=environment())
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}", log)
            yield Process(f"http://127.0.0.1:{port}", process, log)
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise TimeoutError(log.read_text())


def gauge(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vblora_{name} "))


def test_a_hundred_streams_over_four_adapters_then_a_clean_end(files: Files, tmp_path: Path) -> None:
    async def ask(client: AsyncOpenAI, number: int) -> tuple[str, str]:
        """The adapter's header and the text of one streaming request."""
        async with client.completions.with_streaming_response.create(
            model=f"a{number % 4}", prompt=f"fox {number % 8}", max_tokens=20, temperature=0, stream=True
        ) as response:
            chunks = [chunk async for chunk in await response.parse()]
        assert chunks[-1].choices[0].finish_reason in {"stop", "length"}
        return response.headers["X-VBLoRA-Adapter"], "".join(chunk.choices[0].text for chunk in chunks)

    async def ask_all(url: str) -> list[tuple[str, str]]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(100)))

    with serving(files, tmp_path) as server:
        listed = httpx.get(f"{server.url}/v1/adapters").json()["data"]
        revisions = [f"{entry['name']}@{entry['active_revision']}" for entry in listed]
        answers = asyncio.run(ask_all(server.url))
        for number, (header, text) in enumerate(answers):
            assert header == revisions[number % 4]
            assert text == answers[number % 8][1]
        assert len({text for _, text in answers}) == 8
        deadline = time.monotonic() + 1
        while busy := [name for name in ("requests_running", "requests_waiting") if gauge(server.url, name)]:
            assert time.monotonic() < deadline, busy
        server.process.send_signal(signal.SIGTERM)
        status, seconds = server.end(10)
        assert (status, seconds < 5) == (0, True)
        lines = server.log.read_text().splitlines()
        accesses = [json.loads(line) for line in lines if line.startswith("{") and '"path"' in line]
        completions = [line for line in accesses if line["path"] == "/v1/completions"]
        assert len(completions) == 100
        assert {line["adapter"] for line in completions} == set(revisions)
        assert all(line["generated_tokens"] and line["status"] == 200 for line in completions)
        assert "fox" not in "".join(lines)


def _long(stream: bool) -> dict[str, Any]:
    prompts = ["the fox"] * 24  # more rows, slower steps
    return {"model": BASE, "prompt": prompts, "max_tokens": 240, "ignore_eos": True, "stream": stream}


def test_draining_lets_streams_end_while_the_listener_stays_open(files: Files, tmp_path: Path) -> None:
    """Seen to fail with uvicorn's own `handle_exit`, which closes the listener at once."""
    with (
        serving(files, tmp_path) as server,
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=_long(True)) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert httpx.get(f"{server.url}/health/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503
        refused = httpx.post(f"{server.url}/v1/completions", json=_long(False))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["Retry-After"]
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.end(10)[0] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_draining_ends_after_its_timeout(files: Files, tmp_path: Path, stream: bool) -> None:
    async def scenario(server: Process) -> httpx.Response:
        async with httpx.AsyncClient(timeout=60) as client:
            asking = asyncio.create_task(client.post(f"{server.url}/v1/completions", json=_long(stream)))
            while not gauge(server.url, "requests_running"):
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            return await asking

    with serving(files, tmp_path, "--drain-timeout", "0.2") as server:
        reply = asyncio.run(scenario(server))
        status, seconds = server.end(10)
        assert status == 0
        assert seconds < 0.2 + 2 + LOADED_MACHINE_SECONDS
    if stream:
        last = reply.text.strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
    else:
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")


def refused(*arguments: str) -> tuple[int, str]:
    """Exit status and standard error of a start that must fail."""
    result = subprocess.run(
        command("run", *arguments),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=START_SECONDS,
        check=False,
    )
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.returncode, result.stderr


def test_an_open_server_stays_on_loopback(files: Files, tmp_path: Path) -> None:
    status, message = refused(str(files.model), "--host", "0.0.0.0", "--data-dir", str(tmp_path))
    assert status == 2
    assert "--allow-unauthenticated" in message.splitlines()[-1]


def test_a_bad_start_is_one_line(files: Files, tmp_path: Path) -> None:
    data = ["--data-dir", str(tmp_path)]
    cases = [
        ([str(tmp_path / "nowhere"), *data], 1, "nowhere"),
        ([str(files.model), *data, "--adapter", f"x={tmp_path}"], 1, "adapter x"),
        ([str(files.model), *data, "--max-rank", "many"], 2, "--max-rank"),
    ]
    for arguments, expected, words in cases:
        status, message = refused(*arguments)
        assert (status, words in message) == (expected, True), message
        assert "vblora-serve: " in message.splitlines()[-1]


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(files: Files, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, message = refused(str(tmp_path / "nowhere"), "--port", port, "--data-dir", str(tmp_path))
    assert status == 1
    assert f"port {port}" in message


def test_a_server_with_keys_ends_as_clean_and_logs_none_of_them(files: Files, tmp_path: Path) -> None:
    def tenant(*arguments: str) -> tuple[str, str]:
        line = command("tenant", *arguments, "--data-dir", str(tmp_path / "data"))
        result = subprocess.run(line, capture_output=True, text=True, env=environment(), check=True)
        return result.stdout, result.stderr

    key, said = tenant("add", "ops", "--role", "operator")
    assert (key.count("\n"), "restart" in said) == (1, True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        admin = probe.getsockname()[1]
    with serving(files, tmp_path, "--require-keys", "--admin-port", str(admin), "--log-level", "debug") as server:
        headers = {"Authorization": f"Bearer {key.strip()}"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert gauge(f"http://127.0.0.1:{admin}", "adapters_registered") == 4
        other, said = tenant("add", "acme")
        assert "restart" not in said
        other_headers = {"Authorization": f"Bearer {other.strip()}"}
        assert httpx.get(f"{server.url}/v1/models", headers=other_headers).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end(10)[0] == 0
    log = server.log.read_text()
    assert '"tenant": "acme"' in log
    assert key.strip()[8:] not in log and other.strip()[8:] not in log
    assert tenant("list")[0].split() == ["acme", "tenant", "weight=1", "ops", "operator", "weight=1"]


def test_keys_that_are_required_must_be_there(files: Files, tmp_path: Path) -> None:
    status, message = refused(str(files.model), "--require-keys", "--data-dir", str(tmp_path))
    assert (status, "--require-keys" in message.splitlines()[-1]) == (2, True)
    status, message = refused(str(files.model), "--data-dir", str(tmp_path), "--database-url", "mysql://u:secret@h/d")
    assert (status, "sqlite and postgresql" in message.splitlines()[-1], "secret" in message) == (1, True, False)
