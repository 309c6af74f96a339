"""P12: seconds from the command to a server that is ready, the demo's model being in the cache already.

The ratio is to the ten seconds that are wanted.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks import sides

WANTED_SECONDS = 10.0
PATIENCE_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def measure(options: argparse.Namespace, side: str) -> sides.Values:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "serving.cli", "run", options.model, "--dtype", options.dtype]
        command += ["--port", str(port), "--data-dir", folder, "--log-level", "error"]
        began = time.perf_counter()
        server = subprocess.Popen(command)
        try:
            wait_until_ready(server, port)
            return {"ready": time.perf_counter() - began, "wanted": WANTED_SECONDS}
        finally:
            server.terminate()
            server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Ask every 20 ms; end the benchmark if the server ends or takes too long."""
    began = time.perf_counter()
    while not _ready(port):
        if server.poll() is not None or time.perf_counter() - began > PATIENCE_SECONDS:
            sys.exit("the server did not become ready")
        time.sleep(0.02)


def resident(server: subprocess.Popen[bytes]) -> int:
    """Bytes that the server has in memory."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def wait_for_memory(server: subprocess.Popen[bytes]) -> None:
    """Until the server has its cache's memory, which it takes in the background in the first seconds."""
    before, now = 0, 1
    while now > before:
        time.sleep(1)
        before, now = now, resident(server)


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def main() -> None:
    sides.main("P12", "benchmarks.bench_start", sides.arguments(__doc__), measure, ("ready", "wanted"))


if __name__ == "__main__":
    main()
