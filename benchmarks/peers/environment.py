"""The peers' own virtual environments, and jobs that run in them: JSON in, JSON out."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2] / ".peers"
SIDES = Path(__file__).parent
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def run_job(peer: str, job: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `<peer>_side.py` finds for a job, run by the peer's interpreter; its log shows only if it fails."""
    interpreter = ROOT / peer / "bin" / "python"
    if not interpreter.exists():
        raise SystemExit(f"{peer} is not installed in {ROOT.name}/{peer}: `make bench-peers` does that")
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(json.dumps(job, default=str))
        command = [interpreter, SIDES / f"{peer}_side.py", job_file, result_file]
        environment = {**os.environ, **QUIET, **(variables or {})}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or not result_file.exists():
            raise SystemExit(f"{peer} failed with {done.returncode}; the end of its log:\n{done.stdout[-4000:]}")
        result: dict[str, Any] = json.loads(result_file.read_text())
        return result
