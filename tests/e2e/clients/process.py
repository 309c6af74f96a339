"""A client as a process: its output, or the fact that it failed. Knows no client."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

CLIENT_SECONDS = 600.0


class ClientFailed(Exception):
    """A client did not get what it should; the message is its output."""


def run_client(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """What `command` prints, run in `folder`. Raises `ClientFailed` if it ends otherwise than well, or too late."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = process.communicate(timeout=CLIENT_SECONDS)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise ClientFailed(f"not done in {CLIENT_SECONDS:.0f} s:\n{process.communicate()[0]}") from error
    if process.returncode:
        raise ClientFailed(output)
    return output
