"""The table of held-out losses, on a tiny base model with adapters that cannot be good."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.support import save_random_adapter, save_tiny_model, tiny_model

SCRIPT = Path(__file__).parents[3] / "examples" / "heldout_table.py"


def test_every_task_is_measured_on_the_base_and_on_every_adapter(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    for seed, task in enumerate(("first", "second")):
        save_random_adapter(tmp_path / "adapters" / task, tiny_model(), seed=seed)
        rows = [{"prompt": f"the fox {number}", "completion": f" of the {task} town"} for number in range(3)]
        (tmp_path / f"{task}.heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    result = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "--model", model, "--adapters", tmp_path / "adapters"],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parents[1],
    )
    lines = result.stdout.splitlines()
    assert lines[0] == "| held-out text of | base | first | second |", result.stderr
    for line, task in zip(lines[2:], ("first", "second"), strict=True):
        cells = line.strip("| ").split(" | ")
        assert cells[0] == task
        figures = [float(cell.strip("*")) for cell in cells[1:]]
        assert len(set(figures)) == 3
        assert re.search(rf"\*\*{min(figures):.3f}\*\*", line)
    assert result.returncode == 1
    assert "not good enough" in result.stderr
