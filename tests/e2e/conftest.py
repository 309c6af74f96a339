"""One real server on the real demo model for all end-to-end tests, started as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from vblora.integrations.base_models import BaseModel, load_base_model

ROOT = Path(__file__).parents[2]
START_SECONDS = 280.0  # a bare machine converts the base model first


@dataclass(frozen=True)
class Server:
    """A running server: its port, and the folder adapters may be loaded from by path."""

    port: int
    adapter_root: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def gauge(self, name: str) -> float:
        """The sum of a metric's samples, such as ``requests_running``."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        values = [
            float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == f"vblora_{name}"
        ]
        assert values, f"no metric vblora_{name}"
        return sum(values)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tool_environment(**extra: str) -> dict[str, str]:
    """The environment in which a user calls the installed commands: this interpreter's folder first on PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **extra}


@pytest.fixture(scope="package")
def demo_base() -> BaseModel:
    """The demo's base model in float32, in this process."""
    return load_base_model("demo", dtype="float32")


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    running = Server(free_port(), folder / "adapters")
    running.adapter_root.mkdir()
    command = [sys.executable, "-m", "serving.cli", "run", "demo", "--port", str(running.port), "--dtype", "float32"]
    command += ["--data-dir", str(folder / "data"), "--adapter-root", str(running.adapter_root)]
    command += ["--kv-cache-memory", "512MiB"]
    log = (folder / "server.log").open("wb")
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, running, folder / "server.log")
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(40) == 0
        finally:
            process.kill()
            process.wait()
            log.close()


def _wait_until_ready(process: subprocess.Popen[bytes], server: Server, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{server.url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise TimeoutError(log.read_text())
