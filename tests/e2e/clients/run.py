"""`make test-clients`: other people's clients, unchanged, against a server on the demo model that is started here.

It knows how each client is started and what its exit status means, not what it asks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from benchmarks.bench_start import free_port, wait_until_ready
from serving.demo import demo_adapters
from serving.demo.run import BASE_ID
from tests.e2e.clients import evaluation
from tests.e2e.clients.process import ClientFailed, run_client
from vblora.integrations.gguf_cache import converted, demo_source

HERE = Path(__file__).parent
EXECUTABLES = HERE.parents[2] / ".clients" / "bin"
ADAPTER = "saltspoke"
TOGETHER = 4  # the server answers them in one batch
QUIET = {
    "DO_NOT_TRACK": "1", "LANGSMITH_TRACING": "false", "LITELLM_TELEMETRY": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "NO_PROXY": "127.0.0.1",
}  # fmt: skip
"""No telemetry, nothing from a hub, no proxy to the server."""


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The base URL of a float32 server on the demo model with its data in `folder`, ended with the block."""
    port = free_port()
    command = [sys.executable, "-m", "serving.cli", "run", "demo", "--port", str(port), "--dtype", "float32"]
    process = subprocess.Popen([*command, "--data-dir", str(folder / "data"), "--log-level", "error"])
    try:
        wait_until_ready(process, port)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def environment(url: str, folder: Path) -> dict[str, str]:
    """This process's, without keys and addresses of OpenAI's, and with what the clients' scripts read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return kept | QUIET | {"BASE_URL": url, "MODEL": ADAPTER, "HF_HOME": str(folder / "huggingface")}


def node(script: str, given: Mapping[str, str]) -> str:
    """Node's tests in `script`: how many passed."""
    output = run_client(["node", "--test", "--test-reporter=tap", script], HERE / "node", given)
    return next(line.strip("# ") for line in output.splitlines() if line.startswith("# pass"))


def python(script: str, given: Mapping[str, str]) -> str:
    """pytest's tests in `script`: how many passed."""
    output = run_client([str(EXECUTABLES / "python"), "-m", "pytest", script], HERE / "python", given)
    return output.splitlines()[-1].partition(" in ")[0]


def evaluate(model: str, reference: Path, given: Mapping[str, str]) -> str:
    """lm-evaluation-harness on `model`, whose scores must be those of the model in the folder `reference`."""
    rows = evaluation.facts()
    with tempfile.TemporaryDirectory() as folder:
        found = evaluation.harness_scores(EXECUTABLES / "lm_eval", model, reference, Path(folder), given)
    wanted = evaluation.direct_scores(reference, rows)
    difference = evaluation.largest_difference(found, wanted)
    right = evaluation.accuracy(found, rows)
    summary = f"accuracy {right:.3f}, {difference:.1e} nats from transformers"
    if difference < evaluation.TOLERANCE and right == evaluation.accuracy(wanted, rows) >= evaluation.LEAST_ACCURACY:
        return summary
    raise ClientFailed(summary)


def evaluate_merged(folder: Path, given: Mapping[str, str]) -> str:
    """The same of the adapter, beside the model that `vblora merge` writes."""
    command = [str(Path(sys.executable).parent / "vblora"), "merge", "--model", "demo", "--dtype", "float32"]
    command += ["--adapter", str(demo_adapters()[ADAPTER]), "--out", str(folder / "merged")]
    run_client(command, folder, given)
    return evaluate(ADAPTER, folder / "merged", given)


def passes(name: str, check: Callable[[], str]) -> bool:
    """Whether a client's check raises nothing; prints a line, and its output if it failed."""
    began = time.monotonic()
    try:
        said, passed = check(), True
    except ClientFailed as error:
        said, passed = f"FAILED\n{error}", False
    print(f"{name:<16} {time.monotonic() - began:5.1f} s  {said}", flush=True)
    return passed


def checks(folder: Path, given: Mapping[str, str]) -> dict[str, Callable[[], str]]:
    """What there is to run, by name."""
    return {
        "openai": lambda: node("openai.mjs", given),
        "vercel": lambda: node("vercel.mjs", given),
        "langchain": lambda: python("langchain_client.py", given),
        "litellm": lambda: python("litellm_client.py", given),
        "lm-eval": lambda: evaluate(BASE_ID, converted(demo_source(), print), given),
        "lm-eval-adapter": lambda: evaluate_merged(folder, given),
    }


def main() -> int:
    """Run all clients at once, or those whose names are given; exit status 1 if one fails."""
    converted(demo_source(), print)  # minutes on a bare machine: not while the server's start is waited for
    with tempfile.TemporaryDirectory() as name, server(Path(name)) as url:
        found = checks(Path(name), environment(url, Path(name)))
        chosen = sys.argv[1:] or list(found)
        with ThreadPoolExecutor(TOGETHER) as pool:
            passed = list(pool.map(lambda client: passes(client, found[client]), chosen))
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
