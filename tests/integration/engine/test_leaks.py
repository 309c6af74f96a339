"""Adapters that come and go leave nothing behind; `python -m benchmarks.leaks` does it 10,000 times."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.leaks import contents, measure, opened
from serving.engine import Engine
from tests.support import random_adapter, tiny_model

CYCLES = 200


def test_adapters_that_come_and_go_leave_nothing(engine: Engine, tmp_path: Path) -> None:
    """SECURITY.md, "leaks". The second run is the control: seen to fail for what it keeps of each cycle."""
    kept: list[Any] = []
    files = contents(lambda seed: random_adapter(tiny_model(), seed=seed))
    try:
        with opened(engine, tmp_path) as catalog:
            assert measure(engine, catalog, files, CYCLES) == []
            faults = measure(engine, catalog, files, CYCLES, kept)
            assert len(catalog) == engine.residency.stats().adapters == 0
    finally:
        for _, descriptor in kept:
            os.close(descriptor)
    assert [word for fault in faults for word in ("bytes", "files", "threads") if word in fault] == ["bytes", "files"]
