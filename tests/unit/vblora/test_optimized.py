"""`python -O` takes `assert` out: what refuses a stranger's files may not be one."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from tests.adapters import adapter_files, with_config
from vblora.checkpoint import read_adapter_bytes
from vblora.errors import VBLoRAError

ROOT = Path(__file__).parents[3]
CHILD = """
import sys
from pathlib import Path
from vblora.checkpoint import read_adapter_bytes
from vblora.errors import VBLoRAError
assert False, "assertions are on"
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_adapter_bytes((folder / "config").read_bytes(), (folder / "weights").read_bytes())
        print("sound")
    except VBLoRAError as error:
        print(type(error).__name__, ascii(str(error)))
"""


def outcome(config: bytes, weights: bytes) -> str:
    try:
        read_adapter_bytes(config, weights)
    except VBLoRAError as error:
        return f"{type(error).__name__} {str(error)!a}"
    return "sound"


def corpus() -> list[tuple[bytes, bytes]]:
    """A sound adapter, and the same with pieces of it replaced."""
    config, weights = adapter_files(1)
    draw = random.Random(0)
    changed = [(config, weights), with_config((config, weights), r=3), with_config((config, weights), topk=0)]
    for _ in range(150):
        start = draw.randrange(len(weights))
        piece = draw.choice([b"", b"\xff" * 4, b"\0\0\xc0\x7f", b"\x0f\0\0\0", draw.randbytes(4)])
        changed.append((config, weights[:start] + piece + weights[start + draw.choice([0, len(piece), 4, 1000]) :]))
    return changed


def test_checks_of_files_do_not_go_with_assertions(tmp_path: Path) -> None:
    """SECURITY.md, "code in weights": also under `python -O`. Seen to fail with the check of indices in
    `vblora/checkpoint.py` as an assertion."""
    files = corpus()
    for number, (config, weights) in enumerate(files):
        folder = tmp_path / f"{number:03}"
        folder.mkdir()
        (folder / "config").write_bytes(config)
        (folder / "weights").write_bytes(weights)
    command = [sys.executable, "-O", "-c", CHILD, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    expected = [outcome(*pair) for pair in files]
    assert result.stdout.splitlines() == expected
    assert 1 < expected.count("sound") < 100 and len(set(expected)) > 8, "the corpus is of one kind"
