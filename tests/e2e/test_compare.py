"""`examples/customers/compare.sh`, whole, on a tiny model: what it trains, what it prints, and that it goes on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from examples.customers.styles import STYLES
from tests.support import save_tiny_model

SCRIPT = Path(__file__).parents[2] / "examples" / "customers" / "compare.sh"


@pytest.mark.timeout(600)
def test_it_trains_what_is_missing_and_prints_the_table(tmp_path: Path) -> None:
    out = tmp_path / "compare"
    model = str(save_tiny_model(tmp_path / "model"))
    given = {"MODEL": model, "STEPS": "1", "BANK_STEPS": "4", "VECTOR_LENGTH": "16", "OWN": str(out / "shared")}

    def run() -> list[str]:
        done = subprocess.run([SCRIPT, out], env=os.environ | given, check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    first = run()
    found = json.loads(first[-1])
    assert set(found) == set(STYLES)
    assert all(ways["shared bank"]["loss"] == ways["own bank"]["loss"] for ways in found.values())
    assert sum("(log: " in line for line in first) == 1 + 2 * len(STYLES)
    (out / "lora" / "saltspoke" / "adapter_model.safetensors").unlink()
    second = run()
    assert [line.split()[0] for line in second if "(log: " in line] == ["lora-saltspoke"]
    assert json.loads(second[-1]) == found
