"""The documents name files that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "README.md",
    "benchmarks/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]


def test_the_request_path_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "request-path.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    everywhere = {path.name for path in (ROOT / "serving").rglob("*.py")}
    assert len(named) > 15
    assert {name for name in named if not ((ROOT / name).is_file() if "/" in name else name in everywhere)} == set()
    steps = [int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("document", [*DOCUMENTS, "serving/demo/adapters/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    file = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)", file.read_text()):
        assert target.startswith("https://") or (file.parent / target).exists(), target


def test_every_threat_has_its_tests_and_each_says_when_it_fails() -> None:
    """Fails for a row of docs/security.md without a test, and for a test that is not there or that was never seen to
    fail."""
    text = (ROOT / "docs" / "security.md").read_text().partition("## Threat by threat")[2].partition("\n## ")[0]
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith(("|---", "| threat |", "| promise |"))
    ]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text())
            tests = {
                entry.name: entry
                for entry in ast.walk(tree)
                if isinstance(entry, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            assert name in tests, (file, name)
            assert re.search(r"\b[Ff]ails?\b", ast.get_docstring(tests[name]) or ""), (
                f"{file}::{name} says of no defence"
            )
