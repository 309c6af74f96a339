"""Every command and snippet of README.md and docs/ runs, against a real server.

Each document's fences run in order in one folder, as a reader would try them. A fence that cannot run in a test says
so on its first line: ```bash norun: the reason.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Server, tool_environment

DOCUMENTS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-W", "error", "-c"]}


@dataclass(frozen=True)
class Fence:
    language: str
    note: str
    code: str


def fences(document: str) -> list[Fence]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [Fence(*match) for match in FENCE.findall(text)]


def runnable(document: str) -> list[Fence]:
    return [fence for fence in fences(document) if fence.language in RUN and "norun" not in fence.note]


def test_the_readme_shows_what_it_should() -> None:
    code = "\n".join(fence.code for fence in fences("README.md"))
    for wanted in ("make demo", "make test", "curl", "from openai import OpenAI"):
        assert wanted in code
    assert len(runnable("README.md")) >= 3


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_fence_that_does_not_run_says_why(document: str) -> None:
    for fence in fences(document):
        assert fence.language in {*RUN, "text", "json", "jsonl"}, fence.language
        if fence.note.strip():
            assert re.fullmatch(r" norun: .{10,}", fence.note), fence.note


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if runnable(name)])
def test_every_command_runs(document: str, server: Server, tmp_path: Path) -> None:
    if shutil.which("curl") is None and any("curl" in fence.code for fence in runnable(document)):
        pytest.skip("curl is not installed")
    for fence in runnable(document):
        code = fence.code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        result = subprocess.run(
            [*RUN[fence.language], code], cwd=tmp_path, env=tool_environment(), capture_output=True, text=True
        )
        assert result.returncode == 0, f"{fence.code}\n{result.stdout}\n{result.stderr}"
        assert '"error"' not in result.stdout, f"{fence.code}\n{result.stdout}"
