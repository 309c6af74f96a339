"""The engine on its thread, with a real (tiny, random) model."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from serving.engine import Engine, memory
from serving.engine.linears import PackedLinear, SiblingLinear
from serving.errors import (
    ContextLengthExceeded,
    Draining,
    EngineUnavailable,
    InvalidValue,
    ModelNotFound,
    Overloaded,
    RateLimitExceeded,
    StartupError,
)
from serving.types import EngineSettings, GenerationEvent, GenerationRequest, SamplingParams
from tests.integration.engine.conftest import tiny_engine
from tests.support import random_adapter, save_tiny_model, tiny_model, tiny_tokenizer

IDS = itertools.count()


def request(
    prompt: str = "the quick", tenant: str = "default", revision: str | None = None, **params: Any
) -> GenerationRequest:
    sampling = dataclasses.replace(SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), **params)
    return GenerationRequest(f"r{next(IDS)}", tenant, tuple(tiny_tokenizer().encode(prompt)), sampling, revision)


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def test_text_is_that_of_the_tokens(engine: Engine) -> None:
    (answer,) = engine.generate([request(max_tokens=30)])
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == 30
    prompt = tiny_tokenizer().encode("the quick")
    assert "the quick" + answer.text == tiny_tokenizer().decode([*prompt, *answer.token_ids], skip_special_tokens=True)


def test_a_batch_gives_what_each_request_gives_alone(engine: Engine) -> None:
    adapter = engine.load_adapter(random_adapter(tiny_model(), rank=4, seed=1))
    prompts = ["the quick", "a", "the restaurant serves the best food of the town", "fox"]
    alone = [engine.generate([request(p, revision=r)])[0] for p in prompts for r in (None, adapter)]
    together = engine.generate([request(p, revision=r) for p in prompts for r in (None, adapter)])
    assert together == alone
    assert alone[0] != alone[1]


def test_a_cached_prefix_changes_no_answer(engine: Engine) -> None:
    adapter = engine.load_adapter(random_adapter(tiny_model(), rank=4, seed=1))
    text = "the restaurant serves the best food of the town, and the quick brown fox jumps over the lazy dog " * 3

    def ask() -> list[tuple[int, ...]]:
        rows = [request(text, revision=r, **p) for r in (None, adapter) for p in ({}, {"seed": 1, "temperature": 1.0})]
        return [answer.token_ids for answer in engine.generate(rows)]

    cold = ask()
    hits = engine.stats().prefix_hits
    assert ask() == cold
    assert engine.stats().prefix_hits - hits > 4 * 60


def test_seeded_sampling_repeats_and_survives_preemption() -> None:
    roomy, tight = tiny_engine(), tiny_engine(kv_cache_bytes=128 * 2 * 2 * 2 * 16 * 4, max_model_len=128)
    prompts = ["the quick brown fox", "over the lazy dog", "the restaurant"]

    def run(engine: Engine) -> list[tuple[int, ...]]:
        engine.start()
        requests = [request(p, seed=5, temperature=1.0, max_tokens=70, presence_penalty=0.5) for p in prompts]
        answers = [answer.token_ids for answer in engine.generate(requests)]
        engine.close()
        return answers

    assert run(roomy) == run(tight)
    assert roomy.stats().preemptions == 0
    assert tight.stats().preemptions > 0


def test_it_ends_at_end_of_text_at_stop_tokens_and_at_stop_strings(engine: Engine) -> None:
    (free,) = engine.generate([request(max_tokens=12)])
    third = free.token_ids[2]
    (stopped,) = engine.generate([request(max_tokens=12, stop_token_ids=(third,))])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(third) + 1]
    ending = free.text[2:5]
    (cut,) = engine.generate([request(max_tokens=12, stop=(ending,))])
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(ending)]
    bias = ((tiny_tokenizer().eos_token_id, 1000.0),)
    (ended,) = engine.generate([request(max_tokens=12, ignore_eos=False, logit_bias=bias)])
    assert ended.finish_reason == "stop"
    assert ended.text == ""


def test_streams_end_with_a_reason_and_leaving_one_aborts_it(engine: Engine) -> None:
    events = list(engine.stream(request(max_tokens=5)))
    assert [event.finish_reason for event in events] == [None] * 4 + ["length"]
    stream = engine.stream(request(max_tokens=200))
    next(stream)
    assert engine.stats().requests_running == 1
    stream.close()  # type: ignore[attr-defined]
    wait_for(lambda: engine.stats().requests_running == 0)
    assert engine.stats().kv_blocks_used == 0
    assert engine.drained


def test_events_arrive_on_the_loop_that_submitted(engine: Engine) -> None:
    async def collect() -> list[GenerationEvent]:
        return [event async for event in engine.submit(request(max_tokens=6))]

    async def both() -> list[list[GenerationEvent]]:
        return await asyncio.gather(collect(), collect())

    first, second = asyncio.run(both())
    assert [e.token_ids for e in first] == [e.token_ids for e in second]
    assert len(first) == 6


def test_a_failing_step_ends_its_own_requests_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen to fail where `EngineCore.step` lets the exception through."""
    run = engine.runner.run
    failures = iter([True])

    def fail_once(plan: Any) -> torch.Tensor:
        if next(failures, False):
            raise RuntimeError("secret detail")
        return run(plan)

    monkeypatch.setattr(engine.runner, "run", fail_once)
    (failed,) = engine.generate([request()])
    assert failed.finish_reason == "error"
    assert "secret" not in str(failed.error)
    (good,) = engine.generate([request()])
    assert good.finish_reason == "length"
    assert engine.stats().kv_blocks_used == 0
    assert engine.healthy


def test_an_adapter_that_gives_no_numbers_harms_only_itself(engine: Engine) -> None:
    checkpoint = random_adapter(tiny_model(), rank=4, seed=1)
    broken = engine.load_adapter(dataclasses.replace(checkpoint, bank=checkpoint.bank * 1e30))
    (quiet,) = engine.generate([request()])
    answers = engine.generate([request(), request(revision=broken), request()])
    assert [answer.finish_reason for answer in answers] == ["length", "error", "length"]
    assert answers[0] == answers[2] == quiet


def test_in_8_bits_a_request_gets_with_others_what_it_gets_alone() -> None:
    engine = tiny_engine(quantization="int8")
    engine.start()
    kinds = {type(module) for module in engine.runner.model.modules()}
    assert nn.Linear not in kinds and {SiblingLinear, PackedLinear} <= kinds
    adapter = engine.load_adapter(random_adapter(tiny_model(), rank=4, seed=1))
    given = [request(revision=revision, max_tokens=12) for revision in (adapter, None, adapter)]
    alone = [engine.generate([one])[0].token_ids for one in given]
    assert alone[0] != alone[1], "the adapter changes nothing: this shows nothing"
    assert [answer.token_ids for answer in engine.generate(given)] == alone
    engine.close()


def test_more_than_the_memory_is_refused_at_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = tmp_path / "meminfo"
    free.write_text("MemTotal: 99999999 kB\nMemAvailable:      4096 kB\n")
    monkeypatch.setattr(memory, "MEMORY_FILE", free)
    tiny_engine().close()
    with pytest.raises(StartupError, match=r"kv-cache-memory is 4,194,305 bytes, but 4,194,304 are free"):
        tiny_engine(kv_cache_bytes=(1 << 22) + 1)
    with pytest.raises(StartupError, match=r"50000 adapter slots .* take up to [0-9,]+ bytes, but 4,194,304 are free"):
        tiny_engine(adapter_slots=50000)


def test_a_dtype_without_instructions_is_refused_at_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    model = str(save_tiny_model(tmp_path / "model"))
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(StartupError, match=f"dtype is {dtype}, for which this processor has no instructions"):
            Engine.from_settings(EngineSettings(model=model, dtype=dtype))
    Engine.from_settings(EngineSettings(model=model, kv_cache_bytes=1 << 22)).close()


def test_bounds_are_told_by_class(engine: Engine) -> None:
    with pytest.raises(InvalidValue, match="empty"):
        engine.generate([dataclasses.replace(request(), prompt_token_ids=())])
    with pytest.raises(ContextLengthExceeded, match="256"):
        engine.generate([request(max_tokens=255)])
    with pytest.raises(InvalidValue, match="between 0 and 299"):
        engine.generate([dataclasses.replace(request(), prompt_token_ids=(3, 300))])
    with pytest.raises(ModelNotFound):
        engine.generate([request(revision="0" * 64)])
    assert engine.drained


def test_full_queues_refuse_and_the_tenant_s_own_comes_first() -> None:
    engine = tiny_engine(max_batch_size=1, max_queue=3, max_queue_per_tenant=1)

    async def fill() -> None:
        for _ in range(2):  # the first runs, or could: one of them waits
            engine.submit(request(tenant="a", max_tokens=100))
        with pytest.raises(RateLimitExceeded) as limited:
            engine.submit(request(tenant="a"))
        assert limited.value.retry_after
        for tenant in "bc":
            engine.submit(request(tenant=tenant))
        with pytest.raises(Overloaded):
            engine.submit(request(tenant="d"))

    engine.start()
    asyncio.run(fill())
    engine.close()


def test_draining_refuses_new_work_and_finishes_the_old(engine: Engine) -> None:
    stream = engine.stream(request(max_tokens=20))
    next(stream)
    engine.drain()
    with pytest.raises(Draining):
        engine.generate([request()])
    assert [event.finish_reason for event in stream][-1] == "length"
    wait_for(lambda: engine.drained)


def test_a_closed_engine_ends_its_streams_and_takes_no_more(engine: Engine) -> None:
    adapter = engine.load_adapter(random_adapter(tiny_model(), rank=4, seed=1))
    stream = engine.stream(request(max_tokens=200, revision=adapter))
    next(stream)
    engine.close()
    assert list(stream)[-1].finish_reason == "error"
    assert engine.residency.pins(adapter) == 0
    assert not engine.healthy
    with pytest.raises(EngineUnavailable):
        engine.generate([request()])


def test_a_retired_revision_leaves_its_slot_zeroed(engine: Engine) -> None:
    """Seen to fail without `clear` in `EngineCore._clear`."""
    adapter = engine.load_adapter(random_adapter(tiny_model(), rank=4, seed=1))
    engine.generate([request(revision=adapter)])
    assert any(table.any() for table in engine.runner.slots.tables.values())
    engine.residency.retire(adapter)
    engine.generate([request()])
    assert not any(table.any() for table in engine.runner.slots.tables.values())


def test_churn_over_few_slots_gives_each_request_its_own_adapter() -> None:
    """Seen to fail where `SlotPool` gives away a slot in use when none is idle."""
    engine = tiny_engine(adapter_slots=3)
    engine.start()
    adapters = [engine.load_adapter(random_adapter(tiny_model(), rank=r, seed=s)) for s in range(4) for r in (2, 4)]
    alone = [engine.generate([request(revision=adapter)])[0] for adapter in adapters]
    order = [index % len(adapters) for index in range(40)]
    together = engine.generate([request(revision=adapters[index]) for index in order])
    engine.close()
    assert together == [alone[index] for index in order]
    assert len({answer.token_ids for answer in alone}) == len(adapters)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 257}, "positions end at 256"),
        ({"kv_cache_bytes": 1024, "max_model_len": 128}, "fewer than one request"),
        ({"kv_cache_bytes": 10_000}, "too few"),
        ({"max_batched_tokens": 4}, "max-batched-tokens is 4"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_start(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        tiny_engine(**settings)
