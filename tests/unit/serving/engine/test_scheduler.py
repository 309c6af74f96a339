"""The scheduler alone: real blocks and slots, no model. `run` plays the part of the model and adds a token."""

from __future__ import annotations

import itertools

from serving.adapters.slots import SlotPool
from serving.engine.blocks import BlockManager
from serving.engine.detokenizer import Detokenizer
from serving.engine.request import RequestState, StepPlan
from serving.engine.scheduler import SCORED_TOKENS, Scheduler
from serving.types import GenerationRequest, SamplingParams
from tests.support import tiny_tokenizer

BLOCK = 4
ORDER = itertools.count()


def scheduler(blocks: int = 100, slots: int = 9, rows: int = 8, tokens: int = 16) -> Scheduler:
    return Scheduler(BlockManager(blocks, BLOCK), SlotPool(slots), max_batch_size=rows, max_batched_tokens=tokens)


def state(
    length: int,
    tenant: str = "default",
    revision: str | None = None,
    first: int = 0,
    *,
    priority: int = 0,
    leader: RequestState | None = None,
    scored: bool = False,
) -> RequestState:
    """A request of `length` tokens from `first` on: others that begin with it share its blocks."""
    order = next(ORDER)
    tokens = [*range(first, first + length)]
    sampling = SamplingParams(max_tokens=50, prompt_logprobs=0 if scored else None)
    request = GenerationRequest(str(order), tenant, tuple(tokens), sampling, revision, priority=priority)
    detokenizer = Detokenizer(tiny_tokenizer().backend_tokenizer)
    return RequestState(request, detokenizer, seed=0, arrived=0.0, order=order, tokens=tokens, leader=leader)


def run(subject: Scheduler, plan: StepPlan) -> None:
    subject.commit(plan)
    for sampled in plan.sampling:
        sampled.tokens.append(0)


def run_steps(subject: Scheduler, steps: int) -> None:
    for _ in range(steps):
        run(subject, subject.schedule())


def lengths(plan: StepPlan) -> list[int]:
    return [chunk.length for chunk in plan.chunks]


def test_a_long_prompt_is_prefilled_in_chunks_and_samples_at_its_end() -> None:
    subject = scheduler(tokens=16)
    subject.add(long := state(40))
    sampled = []
    for expected in (16, 16, 8):
        plan = subject.schedule()
        assert lengths(plan) == [expected]
        sampled.append(bool(plan.sampling))
        run(subject, plan)
    assert sampled == [False, False, True]
    assert lengths(subject.schedule()) == [1]
    assert long.num_generated == 1


def test_decoding_rows_go_before_prefill_and_share_its_step() -> None:
    subject = scheduler(tokens=16)
    subject.add(state(3))
    run(subject, subject.schedule())
    subject.add(state(40))
    plan = subject.schedule()
    assert lengths(plan) == [1, 15]


def test_a_short_prompt_need_not_wait_for_long_ones() -> None:
    subject = scheduler(tokens=16)
    for first in (0, 100, 200):
        subject.add(state(60, first=first))
    run(subject, subject.schedule())
    subject.add(short := state(5, first=300))
    plan = subject.schedule()
    assert short in plan.sampling
    assert sum(lengths(plan)) == 16


def test_the_oldest_prompt_has_half_of_the_step_whatever_comes() -> None:
    subject = scheduler(tokens=16)
    subject.add(long := state(60))
    for number in range(1, 8):
        subject.add(state(7, first=100 * number))
    plan = subject.schedule()
    assert [chunk.length for chunk in plan.chunks if chunk.state is long] == [8]
    assert sorted(lengths(plan)) == [1, 7, 8]


def test_prompts_of_one_length_are_read_in_the_order_in_which_they_came() -> None:
    subject = scheduler(tokens=16)
    states = [state(24, first=100 * number) for number in range(3)]
    for entry in states:
        subject.add(entry)
    done: list[RequestState] = []
    while len(done) < 3:
        plan = subject.schedule()
        ended = plan.sampling
        assert sum(lengths(plan)) == 16 or len(ended) == len(subject.running)
        run(subject, plan)
        for entry in ended:
            subject.remove(entry)
        done += ended
    assert done == states


def test_the_newest_is_preempted_and_the_oldest_always_progresses() -> None:
    subject = scheduler(blocks=4, tokens=64)
    old, new = state(7), state(7, first=100)
    subject.add(old)
    subject.add(new)
    for _ in range(2):
        run(subject, subject.schedule())
    plan = subject.schedule()
    assert [chunk.state for chunk in plan.chunks] == [old]
    assert subject.preemptions == 1
    assert new.computed == 0
    assert new.block_table == []
    assert new.num_generated == 2
    before = old.num_generated
    run(subject, plan)
    assert old.num_generated == before + 1


def test_a_preempted_request_computes_all_its_tokens_again_and_samples_once() -> None:
    subject = scheduler(tokens=64)
    subject.add(only := state(5))
    for _ in range(3):
        run(subject, subject.schedule())
    subject.preempt(only)
    subject.blocks.grow(others := [], 100 * BLOCK)  # all blocks, with what they knew
    subject.blocks.release(others)
    plan = subject.schedule()
    assert lengths(plan) == [8]
    assert plan.sampling == [only]


def test_a_preempted_request_comes_back_before_those_that_came_later() -> None:
    subject = scheduler(rows=1)
    first, second = state(3), state(3)
    subject.add(first)
    subject.add(second)
    run(subject, subject.schedule())
    subject.preempt(first)
    assert [chunk.state for chunk in subject.schedule().chunks] == [first]


def test_requests_wait_for_a_slot_when_all_hold_other_revisions() -> None:
    subject = scheduler(slots=2)
    a, b = state(3, revision="a"), state(3, revision="b")
    subject.add(a)
    subject.add(b)
    plan = subject.schedule()
    assert [chunk.state for chunk in plan.chunks] == [a]
    assert [(fill.slot, fill.revision) for fill in plan.fills] == [(1, "a")]
    run(subject, plan)
    subject.remove(a)
    plan = subject.schedule()
    assert [chunk.state for chunk in plan.chunks] == [b]
    assert [(fill.slot, fill.revision) for fill in plan.fills] == [(1, "b")]


def test_the_tenant_served_least_is_admitted_next() -> None:
    subject = scheduler(rows=1, tokens=64)
    for tenant, length in (("greedy", 20), ("greedy", 20), ("modest", 5), ("modest", 5), ("modest", 5)):
        subject.add(state(length, tenant))
    order = []
    while subject.has_work:
        plan = subject.schedule()
        order.append(plan.chunks[0].state.request.tenant)
        run(subject, plan)
        subject.remove(plan.chunks[0].state)
    assert order == ["greedy", "modest", "modest", "modest", "greedy"]


def test_idleness_earns_no_credit() -> None:
    subject = scheduler(rows=1, tokens=64)
    busy = [state(10, "busy", first=100 * number) for number in range(6)]
    for entry in busy:
        subject.add(entry)
    for entry in busy[:3]:
        run(subject, subject.schedule())
        subject.remove(entry)
    late = [state(10, "late", first=100 * number) for number in range(3)]
    for entry in late:
        subject.add(entry)
    served = []
    for _ in range(4):
        plan = subject.schedule()
        served.append(plan.chunks[0].state.request.tenant)
        run(subject, plan)
        subject.remove(plan.chunks[0].state)
    assert sorted(served) == ["busy", "busy", "late", "late"]


def test_everything_is_given_back_at_the_end() -> None:
    subject = scheduler(blocks=20)
    states = [state(5, revision=str(index % 3)) for index in range(6)]
    for entry in states:
        subject.add(entry)
    run(subject, subject.schedule())
    for entry in states:
        subject.remove(entry)
    assert subject.blocks.num_free == 20
    assert subject.slots.used == 0
    assert not subject.has_work


def test_a_prefix_that_was_computed_is_not_computed_again() -> None:
    subject = scheduler(tokens=64)
    subject.add(first := state(11))
    run_steps(subject, 3)
    subject.remove(first)
    subject.add(second := state(11))
    assert lengths(subject.schedule()) == [3]
    assert (second.cached, second.computed) == (8, 8)
    assert (subject.prefix_queries, subject.prefix_hits) == (22, 8)


def test_the_last_token_is_computed_in_any_case() -> None:
    subject = scheduler(tokens=64)
    subject.add(state(8))
    run_steps(subject, 1)
    subject.add(later := state(8))
    plan = subject.schedule()
    assert lengths(plan) == [1, 4]
    assert later.cached == 4
    assert later in plan.sampling


def test_running_requests_share_blocks_and_never_write_to_them() -> None:
    subject = scheduler(tokens=64)
    subject.add(first := state(9))
    run_steps(subject, 1)
    subject.add(second := state(9))
    run_steps(subject, 6)
    assert first.block_table[:2] == second.block_table[:2]
    assert not {*first.block_table[2:]} & {*second.block_table}


def test_no_prefix_is_shared_beyond_tenant_and_revision() -> None:
    subject = scheduler(tokens=256)
    entries = [state(9, *key) for key in (("ann",), ("bob",), ("ann", "a"), ("ann", "b"), ("ann", "a"))]
    for entry in entries:
        subject.add(entry)
        run_steps(subject, 1)
        subject.remove(entry)
    assert [entry.cached for entry in entries] == [0, 0, 0, 0, 8]


def test_generated_tokens_are_a_prefix_too() -> None:
    subject = scheduler(tokens=64)
    subject.add(first := state(6))
    run_steps(subject, 8)
    tokens = list(first.tokens)
    subject.remove(first)
    later = state(6)
    later.tokens[:] = [*tokens, 1, 2]
    subject.add(later)
    subject.schedule()
    assert later.computed == 12


def test_a_preempted_request_takes_its_own_blocks_back() -> None:
    subject = scheduler(tokens=64)
    subject.add(only := state(9))
    run_steps(subject, 2)
    subject.preempt(only)
    plan = subject.schedule()
    assert lengths(plan) == [3]
    assert only.cached == 0


def test_a_step_that_failed_leaves_nothing_to_share() -> None:
    subject = scheduler(tokens=64)
    subject.add(first := state(9))
    subject.schedule()
    subject.remove(first)
    subject.add(second := state(9))
    subject.schedule()
    assert second.cached == 0


def test_a_request_that_must_wait_holds_no_blocks() -> None:
    subject = scheduler(blocks=6, slots=2, tokens=64)
    subject.add(first := state(9, revision="a"))
    run_steps(subject, 1)
    subject.remove(first)
    subject.add(holder := state(5, revision="b"))
    run_steps(subject, 1)
    subject.add(waiting := state(9, revision="a"))
    run_steps(subject, 1)
    assert (waiting.block_table, waiting.computed) == ([], 0)
    subject.remove(holder)
    subject.schedule()
    assert waiting.cached == 8


def test_within_a_tenant_a_lower_priority_goes_first_and_nowhere_else() -> None:
    subject = scheduler(rows=1)
    later, first, other = state(4, priority=1), state(4, priority=-1), state(4, "other", priority=9)
    for waiting in (later, first, other):
        subject.add(waiting)
    taken = []
    while subject.has_work:
        run_steps(subject, 1)
        taken.append(subject.running[0])
        subject.remove(subject.running[0])
    assert taken == [first, other, later]


def test_a_row_waits_for_the_prompt_of_the_one_it_follows() -> None:
    subject = scheduler(tokens=16)
    leader = state(40)
    follower = state(40, leader=leader)
    for waiting in (leader, follower, state(4, first=100)):
        subject.add(waiting)
    run_steps(subject, 2)
    assert follower not in subject.running
    while not leader.prompt_done:
        run_steps(subject, 1)
    run_steps(subject, 1)
    assert follower in subject.running
    assert follower.cached == 36  # all full blocks, less the token that is computed in any case


def test_nobody_waits_for_a_row_that_is_gone() -> None:
    subject = scheduler(tokens=16)
    leader = state(40)
    follower = state(40, leader=leader)
    subject.add(leader)
    subject.add(follower)
    run_steps(subject, 1)
    assert follower not in subject.running
    subject.remove(leader)
    run_steps(subject, 1)
    assert follower in subject.running


def test_prompts_that_are_scored_share_a_budget_and_use_no_cached_blocks() -> None:
    subject = scheduler(blocks=400, tokens=512)
    run_step_of(subject, plain := state(300))
    subject.remove(plain)
    scored, short, free = state(300, scored=True), state(60, scored=True, first=500), state(200, first=700)
    for waiting in (scored, short, free):
        subject.add(waiting)
    by_state = {chunk.state.order: chunk.length for chunk in subject.schedule().chunks}
    assert by_state == {scored.order: SCORED_TOKENS, free.order: 200}  # the oldest first, and nothing left for `short`
    assert scored.cached == 0


def run_step_of(subject: Scheduler, waiting: RequestState) -> None:
    subject.add(waiting)
    run_steps(subject, 1)
