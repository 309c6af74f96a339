"""Fairness between tenants, on the trace of steps of the real scheduler; and the arithmetic behind it.

`Trace` plays the part of the model and of clients who always have more requests waiting.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.adapters.slots import SlotPool
from serving.engine.blocks import BlockManager
from serving.engine.detokenizer import Detokenizer
from serving.engine.fairness import REMEMBERED, ServiceCounters
from serving.engine.request import RequestState, StepPlan
from serving.engine.scheduler import CROWDING, GENERATED_TOKEN_COST, SCORED_TOKENS, Scheduler
from serving.types import GenerationRequest, SamplingParams
from tests.support import tiny_tokenizer

BLOCK, ROWS, BUDGET = 4, 8, 32
LONGEST_PROMPT, LONGEST_ANSWER = 40, 30
ORDER = itertools.count()


def state(
    tenant: str, length: int, answer: int = 20, weight: float = 1.0, priority: int = 0, scored: bool = False
) -> RequestState:
    """A request with a prompt like no other."""
    order = next(ORDER)
    tokens = [order, *range(1, length)]
    sampling = SamplingParams(max_tokens=answer, prompt_logprobs=0 if scored else None)
    request = GenerationRequest(str(order), tenant, tuple(tokens), sampling, priority=priority, weight=weight)
    detokenizer = Detokenizer(tiny_tokenizer().backend_tokenizer)
    return RequestState(request, detokenizer, seed=0, arrived=0.0, order=order, tokens=tokens)


def scheduler(blocks: int = 400, rows: int = ROWS, tokens: int = BUDGET) -> Scheduler:
    return Scheduler(BlockManager(blocks, BLOCK), SlotPool(9), max_batch_size=rows, max_batched_tokens=tokens)


class Trace:
    """Steps of a scheduler; what each tenant got in them."""

    def __init__(self, subject: Scheduler) -> None:
        self.subject = subject
        self.generated: Counter[str] = Counter()
        self.read: Counter[str] = Counter()

    def step(self) -> StepPlan:
        plan = self.subject.schedule()
        for chunk in plan.chunks:
            self.read[chunk.state.request.tenant] += chunk.length
        self.subject.commit(plan)
        for sampled in plan.sampling:
            sampled.tokens.append(0)
            self.generated[sampled.request.tenant] += 1
            if sampled.num_generated >= sampled.request.sampling.max_tokens:
                self.subject.remove(sampled)
        return plan

    def keep_waiting(self, tenant: str, weight: float, chance: random.Random) -> None:
        """Fill the tenant's queue up to three requests of random size."""
        while len(self.subject._waiting.get(tenant, ())) < 3:
            length, answer = chance.randint(1, LONGEST_PROMPT), chance.randint(1, LONGEST_ANSWER)
            self.subject.add(state(tenant, length, answer, weight))


@pytest.mark.parametrize("blocks", [400, 60], ids=["room for all", "preempting"])
@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 2.0, "c": 5.0}])
def test_counters_of_backlogged_tenants_stay_within_the_papers_bound(weights: dict[str, float], blocks: int) -> None:
    """Seen to fail where the turn goes by arrival alone, in `Scheduler._next`."""
    trace, chance = Trace(scheduler(blocks)), random.Random(0)
    most = ROWS * (LONGEST_PROMPT + LONGEST_ANSWER)
    for step in range(1500):
        for tenant, weight in weights.items():
            trace.keep_waiting(tenant, weight, chance)
        trace.step()
        for one, other in itertools.combinations(weights, 2):
            bound = max(LONGEST_PROMPT, GENERATED_TOKEN_COST * most) / min(weights[one], weights[other])
            apart = abs(trace.subject.service[one] - trace.subject.service[other])
            assert apart <= bound, f"{one} and {other} after {step} steps"


@pytest.mark.parametrize("heavy", [1, 3, 10])
def test_generated_tokens_follow_the_weights(heavy: int) -> None:
    """Both always have more waiting, all of one size, so that service and generated tokens have one ratio."""
    trace = Trace(scheduler())
    for _ in range(2000):
        for tenant, weight in (("heavy", heavy), ("light", 1)):
            while len(trace.subject._waiting.get(tenant, ())) < 10:
                trace.subject.add(state(tenant, 20, weight=weight))
        trace.step()
    assert trace.generated["heavy"] / trace.generated["light"] == pytest.approx(heavy, rel=0.1)


def test_who_asks_for_more_gets_no_more() -> None:
    """Fifty requests waiting against four, of one size."""
    trace = Trace(scheduler())
    for _ in range(1000):
        while len(trace.subject._waiting.get("flood", ())) < 50:
            trace.subject.add(state("flood", 20))
        while len(trace.subject._waiting.get("steady", ())) < 4:
            trace.subject.add(state("steady", 20))
        trace.step()
    assert trace.generated["flood"] / trace.generated["steady"] == pytest.approx(1, rel=0.1)


def test_prompts_are_charged_when_they_are_admitted_so_that_one_tenant_cannot_take_all_rows_at_once() -> None:
    subject = scheduler(tokens=400)
    for tenant in ("a",) * ROWS + ("b",) * ROWS:
        subject.add(state(tenant, 10))
    subject.schedule()
    assert Counter(running.request.tenant for running in subject.running) == {"a": ROWS // 2, "b": ROWS // 2}


def test_a_tenant_without_a_row_takes_the_newest_of_one_with_too_many() -> None:
    trace = Trace(scheduler())
    flood = [state("flood", 5, answer=1000) for _ in range(ROWS)]
    for entry in flood:
        trace.subject.add(entry)
    for _ in range(5):
        trace.step()
    trace.subject.add(late := state("late", 5, answer=1000))
    trace.step()
    assert late.num_generated == 1
    assert [entry.preemptions for entry in flood] == [0] * (ROWS - 1) + [1]
    for _ in range(20):
        trace.step()
    assert trace.subject.preemptions == 1


def test_a_tenant_takes_rows_up_to_its_part_and_waits_for_more() -> None:
    trace = Trace(scheduler())
    for _ in range(ROWS):
        trace.subject.add(state("flood", 5, answer=1000))
    trace.step()
    late = [state("late", 5, answer=1000) for _ in range(ROWS)]
    for entry in late:
        trace.subject.add(entry)
    for _ in range(100):
        trace.step()
    assert Counter(running.request.tenant for running in trace.subject.running) == {"flood": 4, "late": 4}
    assert trace.subject.preemptions == 4, "those that stay are not disturbed again"


def test_who_wants_no_more_than_its_part_of_the_rows_need_not_be_the_least_served() -> None:
    trace = Trace(scheduler())
    for _ in range(2 * ROWS):
        trace.subject.add(state("flood", 2, answer=1000))
    trace.step()
    trace.subject.add(state("late", 200, answer=1000))
    trace.step()
    assert trace.subject.service["late"] > trace.subject.service["flood"] + 100
    for entry in (more := [state("late", 2, answer=1000) for _ in range(2)]):
        trace.subject.add(entry)
    trace.step()
    assert all(entry in trace.subject.running for entry in more)
    for entry in (queued := [state("late", 2) for _ in range(2)]):
        trace.subject.add(entry)
    trace.step()
    assert not any(entry in trace.subject.running for entry in queued), "five are more than half of eight"


def test_who_has_too_many_rows_sits_out_one_step_for_the_prompt_of_one_within_its_part() -> None:
    trace = Trace(scheduler())
    trace.subject.add(state("small", 5, answer=1000))
    for _ in range(3 * ROWS):
        trace.subject.add(state("flood", 5, answer=1000))
    for _ in range(5):
        trace.step()
    trace.subject.add(late := state("small", 5, answer=1000))
    plan = trace.step()
    assert [chunk.state.request.tenant for chunk in plan.chunks] == ["small", "small"], "its other answer goes on"
    assert late.num_generated == 1
    assert Counter(chunk.state.request.tenant for chunk in trace.step().chunks) == {"small": 2, "flood": ROWS - 2}


def test_nobody_sits_out_two_steps_in_a_row_whatever_others_send() -> None:
    trace = Trace(scheduler())
    for _ in range(2 * ROWS):
        trace.subject.add(state("flood", 5, answer=1000))
    for _ in range(5):
        trace.step()
    before = trace.generated.copy()
    for _ in range(40):
        trace.subject.add(state("eager", 5, answer=1))
        trace.step()
    assert trace.generated["eager"] - before["eager"] == 40
    assert trace.generated["flood"] - before["flood"] == 20 * (ROWS - 1)


def test_who_crowds_others_reads_little_in_a_step() -> None:
    trace = Trace(scheduler())
    for _ in range(3 * ROWS):
        trace.subject.add(state("flood", 30, answer=2))
    assert sum(chunk.length for chunk in trace.step().chunks) == BUDGET, "nobody is there to be crowded"
    trace.subject.add(state("small", 5, answer=1000))
    for _ in range(20):
        trace.subject.add(state("flood", 30, answer=2))
        prompts = [chunk.length for chunk in trace.step().chunks if chunk.length > 1]
        assert sum(prompts) <= 5 + BUDGET // CROWDING
    assert trace.generated["flood"] > 4


def test_nobody_sits_out_without_a_queue() -> None:
    trace = Trace(scheduler())
    for tenant in ["large"] * 6 + ["late"]:
        trace.subject.add(state(tenant, 2, answer=1000))
        trace.step()
    assert [running.num_generated for running in trace.subject.running] == [7, 6, 5, 4, 3, 2, 1]


def test_a_row_taken_at_a_step_has_no_stale_part_in_it() -> None:
    trace = Trace(scheduler(rows=2))
    rows = [state("flood", 5, answer=1000) for _ in range(2)]
    for entry in rows:
        trace.subject.add(entry)
    trace.step()
    trace.subject.add(state("late", 5, answer=1))
    plan = trace.step()
    assert [chunk.state.request.tenant for chunk in plan.chunks] == ["flood", "late"]
    for _ in range(3):
        plan = trace.step()
    assert {chunk.state.order for chunk in plan.chunks} == {entry.order for entry in rows}
    assert all(chunk.start == len(chunk.state.tokens) - 2 for chunk in plan.chunks)


def test_a_row_that_goes_and_comes_back_within_a_step_begins_where_its_cache_ends() -> None:
    subject = scheduler(blocks=11, rows=4, tokens=64)
    rows = [state("flood", 2), state("flood", 20), state("flood", 9, priority=-1)]
    for entry in rows:
        subject.add(entry)
    Trace(subject).step()
    subject.add(late := state("late", 28, weight=3.0))
    subject._some_sat_out = True  # or the flood would not be in the next step
    plan = subject.schedule()
    assert [entry.preemptions for entry in rows] == [0, 1, 1]
    assert {chunk.state.order for chunk in plan.chunks} == {rows[0].order, rows[2].order, late.order}
    assert all(chunk.start == chunk.state.computed and chunk.samples for chunk in plan.chunks)


def test_nobody_loses_a_row_to_more_tenants_than_there_are_rows() -> None:
    trace = Trace(scheduler(rows=4))
    for number in range(12):
        trace.subject.add(state(f"t{number}", 5, answer=10))
    while trace.subject.has_work:
        trace.step()
    assert trace.subject.preemptions == 0
    assert set(trace.generated.values()) == {10}


def test_a_heavier_tenant_keeps_its_larger_part_of_the_rows() -> None:
    trace = Trace(scheduler())
    for _ in range(6):
        trace.subject.add(state("heavy", 5, answer=1000, weight=3.0))
    for _ in range(2):
        trace.subject.add(state("light", 5, answer=1000))
    trace.step()
    trace.subject.add(state("late", 5, answer=1000, weight=4.0))
    trace.step()
    held = Counter(running.request.tenant for running in trace.subject.running)
    assert held == {"heavy": 5, "light": 2, "late": 1}, "the parts of the eight rows are 3, 1 and 4"


def test_who_has_no_more_than_its_part_of_the_rows_keeps_it_however_much_it_was_served() -> None:
    trace = Trace(scheduler())
    for tenant, length in (("many", 2),) * 6 + (("long", 100),) * 2:
        trace.subject.add(state(tenant, length, answer=1000))
    trace.step()
    assert trace.subject.service["long"] > trace.subject.service["many"]
    trace.subject.add(state("late", 2))
    trace.step()
    assert Counter(running.request.tenant for running in trace.subject.running) == {"many": 5, "long": 2, "late": 1}


def test_the_room_for_prompts_is_shared_by_weight() -> None:
    subject = scheduler(tokens=30)
    for _ in range(5):
        subject.add(state("short ones", 6))
    subject.add(state("long", 300, weight=2.0))
    read: Counter[str] = Counter()
    for chunk in subject.schedule().chunks:
        read[chunk.state.request.tenant] += chunk.length
    assert read == {"short ones": 10, "long": 20}


def test_what_one_tenant_leaves_of_the_room_is_for_the_others() -> None:
    subject = scheduler(tokens=30)
    subject.add(state("long", 300))
    subject.add(state("short", 4))
    plan = subject.schedule()
    assert {chunk.state.request.tenant: chunk.length for chunk in plan.chunks} == {"long": 26, "short": 4}


def test_a_long_prompt_is_read_whatever_others_send() -> None:
    """New prompts that fill a step by themselves come at every step; half of each step is the long one's all the
    same."""
    trace = Trace(scheduler(rows=32))
    trace.subject.add(long := state("patient", 320))
    steps = 0
    while not long.prompt_done:
        for _ in range(6):
            trace.subject.add(state("eager", 8, answer=1))
        trace.step()
        steps += 1
    assert steps <= 2 * 320 / BUDGET + 2


def test_a_flood_of_prompts_does_not_slow_the_answers_of_others() -> None:
    trace = Trace(scheduler())
    trace.subject.add(answering := state("answering", 4, answer=200))
    trace.step()
    for step in range(1, 60):
        trace.subject.add(state("flood", 40, answer=1))
        trace.step()
        assert answering.num_generated == step + 1


def test_the_log_probabilities_of_prompts_are_shared_too() -> None:
    subject = scheduler(tokens=1000)
    subject.add(state("first", 600, scored=True))
    subject.add(state("second", 600, scored=True))
    lengths = {chunk.state.request.tenant: chunk.length for chunk in subject.schedule().chunks}
    assert lengths == {"first": SCORED_TOKENS // 2, "second": SCORED_TOKENS // 2}


def test_when_the_cache_is_full_who_was_served_most_makes_room() -> None:
    trace = Trace(scheduler(blocks=18, rows=3, tokens=64))
    flood = [state("flood", 11, answer=100) for _ in range(2)]
    for entry in flood:
        trace.subject.add(entry)
    trace.step()
    trace.subject.add(late := state("late", 11, answer=100))  # the newest
    while not trace.subject.preemptions:
        trace.step()
    assert [entry.preemptions for entry in (*flood, late)] == [0, 1, 0]


def test_priority_orders_a_tenants_own_and_does_not_reach_others() -> None:
    subject = scheduler(rows=2)
    urgent = state("a", 5, priority=-100)
    for waiting in (state("a", 5), urgent, state("a", 5, priority=-100), state("b", 5, priority=100)):
        subject.add(waiting)
    subject.schedule()
    assert [running.request.tenant for running in subject.running] == ["a", "b"]
    assert subject.running[0] is urgent


def test_who_comes_to_an_idle_server_starts_level_with_who_left_last() -> None:
    counters = ServiceCounters()
    counters.weigh("busy", 1.0)
    counters.join("busy", [], [])
    counters.leave("busy")
    counters.charge("busy", 500)
    counters.weigh("new", 1.0)
    counters.join("new", [], [])
    assert counters["new"] == counters["busy"] == 500


def test_who_leaves_ahead_of_the_others_comes_back_ahead() -> None:
    counters = ServiceCounters()
    for tenant in ("a", "b"):
        counters.weigh(tenant, 1.0)
    counters.join("a", [], [])
    counters.join("b", ["a"], [])
    counters.charge("a", 100)
    counters.leave("a")
    counters.join("a", ["b"], [])
    assert (counters["a"], counters["b"]) == (100, 0)


def test_counters_of_tenants_that_are_gone_are_dropped() -> None:
    counters = ServiceCounters()
    for number in range(4 * REMEMBERED):
        tenant = f"t{number}"
        counters.weigh(tenant, 1.0)
        counters.join(tenant, [], [])
        counters.charge(tenant, 1)
        counters.leave(tenant)
    assert len(counters) <= REMEMBERED + 2


@given(
    total=st.integers(0, 600),
    tenants=st.lists(st.tuples(st.integers(1, 400), st.floats(0.01, 100)), min_size=1, max_size=8),
)
def test_shares_give_everything_out_by_weight_and_nobody_more_than_it_wants(
    total: int, tenants: list[tuple[int, float]]
) -> None:
    counters = ServiceCounters()
    demands = {}
    for number, (demand, weight) in enumerate(tenants):
        counters.weigh(str(number), weight)
        demands[str(number)] = demand
    shares = counters.shares(total, demands)
    assert list(shares) == list(demands)
    assert sum(shares.values()) == min(total, sum(demands.values()))
    weights = sum(weight for _, weight in tenants)
    for (demand, weight), share in zip(tenants, shares.values(), strict=True):
        assert min(demand, int(total * weight / weights)) <= share <= demand
