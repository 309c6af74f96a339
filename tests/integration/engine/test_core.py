"""Steps of the engine without its thread, where what shares a step can be chosen."""

from __future__ import annotations

from typing import Any

import pytest

from serving.adapters.residency import Residency
from serving.engine.core import EngineCore
from serving.engine.model_runner import ModelRunner
from serving.types import EngineSettings, GenerationRequest, SamplingParams
from tests.integration.engine.conftest import tiny_core
from tests.support import random_adapter, tiny_model
from vblora.checkpoint import content_hash

SETTINGS = EngineSettings(model="tiny", max_batch_size=4, max_batched_tokens=24, kv_cache_bytes=1 << 20)
REVISION = content_hash(random_adapter(tiny_model()))


def new_core() -> EngineCore:
    runner = ModelRunner(tiny_model(), SETTINGS)
    residency = Residency()
    residency.put(REVISION, runner.layout.compact(random_adapter(tiny_model())))
    return tiny_core(runner, residency, SETTINGS)


def add(core: EngineCore, name: str, length: int, revision: str | None = None) -> None:
    if revision:
        core._residency.pin(revision)
    prompt = tuple(3 + (7 * len(name) + index) % 290 for index in range(length))
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    core.add(GenerationRequest(name, "default", prompt, params, revision), 0.0)


def finish(core: EngineCore) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while core.has_work:
        for event in core.step():
            assert event.finish_reason in (None, "length")
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
    return tokens


def test_a_composition_that_failed_serves_nobody_even_who_had_no_token_in_that_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = new_core()
    add(alone, "adapted", 50, REVISION)
    expected = finish(alone)["adapted"]
    core = new_core()
    add(core, "oldest", 60)
    add(core, "shorter", 20)
    add(core, "adapted", 50, REVISION)
    fill = core.runner.slots.fill

    def half(slot: int, adapter: Any) -> None:
        fill(slot, adapter)
        core.runner.slots.tables[adapter.bucket][slot, ::2] = 7.0
        raise RuntimeError("torn off")

    monkeypatch.setattr(core.runner.slots, "fill", half)
    ended = {event.request_id: event.finish_reason for event in core.step()}
    assert ended == {"oldest": "error", "shorter": "error", "adapted": "error"}
    monkeypatch.setattr(core.runner.slots, "fill", fill)
    assert not core.has_work and core.stats().kv_blocks_used == core.stats().slots_used == 0
    add(core, "adapted", 50, REVISION)
    assert finish(core)["adapted"] == expected
