"""One step of the engine, and the requests it moves on: schedule, run, sample, commit, publish.

Runs on one thread and knows nothing of others, of event loops or of HTTP.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Sequence

from tokenizers import Tokenizer

from serving.adapters.residency import Residency
from serving.adapters.slots import SlotPool
from serving.engine.blocks import BlockManager
from serving.engine.detokenizer import Detokenizer
from serving.engine.model_runner import ModelRunner
from serving.engine.request import Finish, RequestState, StepPlan
from serving.engine.sampler import sample
from serving.engine.scheduler import Scheduler
from serving.types import EngineObserver, EngineSettings, EngineStats, GenerationEvent, GenerationRequest, StepReport

log = logging.getLogger(__name__)

STEP_FAILED = "the server failed while it worked on this request"
NOT_FINITE = "the model's output was not a number: the adapter or the parameters drive it out of range"


class EngineCore:
    """The requests of the engine and the parts that serve them."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        end_of_text: frozenset[int],
        residency: Residency,
        settings: EngineSettings,
        observer: EngineObserver,
    ) -> None:
        self.runner = runner
        self.blocks = BlockManager(runner.num_blocks, runner.block_size)
        self.slots = SlotPool(runner.slots.num_slots)
        self.scheduler = Scheduler(
            self.blocks,
            self.slots,
            max_batch_size=settings.max_batch_size,
            max_batched_tokens=settings.max_batched_tokens,
        )
        self._tokenizer = tokenizer
        self._end_of_text = end_of_text
        self._residency = residency
        self._observer = observer
        self._requests: dict[str, RequestState] = {}
        self._order = itertools.count()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def stats(self) -> EngineStats:
        """The gauges as of now."""
        return EngineStats(
            requests_running=len(self.scheduler.running),
            requests_waiting=self.scheduler.num_waiting,
            kv_blocks_used=self.blocks.num_blocks - self.blocks.num_free,
            kv_blocks_total=self.blocks.num_blocks,
            slots_used=self.slots.used,
            slots_total=self.runner.slots.num_slots,
            preemptions=self.scheduler.preemptions,
            prefix_queries=self.scheduler.prefix_queries,
            prefix_hits=self.scheduler.prefix_hits,
        )

    def add(self, request: GenerationRequest, arrived: float) -> None:
        """Queue a request, whose revision must be pinned in the residency until it ends."""
        params = request.sampling
        detokenizer = Detokenizer(
            self._tokenizer,
            request.prompt_token_ids,
            stop=params.stop,
            skip_special_tokens=params.skip_special_tokens,
        )
        seed = secrets.randbits(63) if params.seed is None else params.seed
        state = RequestState(
            request, detokenizer, seed, arrived, next(self._order), tokens=list(request.prompt_token_ids)
        )
        self._requests[request.request_id] = state
        self.scheduler.add(state)

    def abort(self, request_id: str) -> list[GenerationEvent]:
        """End a request wherever it is; unknown ids are ignored."""
        state = self._requests.get(request_id)
        return [] if state is None else [self._finish(state, Finish("abort"))]

    def step(self) -> list[GenerationEvent]:
        """Run one step. An exception in it ends the requests it was about, and no others."""
        self._drop_retired()
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        try:
            self._fill_slots(plan)
            logits = self.runner.run(plan)
            tokens = sample(logits, plan.sampling, self._end_of_text)
            events = self._commit(plan, tokens)
        except Exception:
            log.exception("a step of %d requests failed", len(plan.chunks))
            return self._fail(plan)
        self._report(plan, time.perf_counter() - began)
        return events

    def _fill_slots(self, plan: StepPlan) -> None:
        for seconds in self.runner.fill(plan.fills, self._residency.get):
            self._observer.on_compose(seconds)
        now = time.monotonic()
        for chunk in plan.chunks:
            if chunk.state.admitted is None:
                chunk.state.admitted = now
                self._observer.on_admitted(now - chunk.state.arrived)

    def _commit(self, plan: StepPlan, tokens: Sequence[int | None]) -> list[GenerationEvent]:
        """Record what the step computed; returns an event for every request that got a token."""
        self.scheduler.commit(plan)
        return [self._take(state, token) for state, token in zip(plan.sampling, tokens, strict=True)]

    def _take(self, state: RequestState, token: int | None) -> GenerationEvent:
        if token is None:
            return self._finish(state, Finish("error", NOT_FINITE))
        state.tokens.append(token)
        self._clock(state)
        params = state.request.sampling
        ends = token in params.stop_token_ids or (token in self._end_of_text and not params.ignore_eos)
        text = "" if ends else state.detokenizer.push(token)
        if ends or state.detokenizer.stopped:
            return self._finish(state, Finish("stop"), text, token)
        if state.num_generated >= params.max_tokens or len(state.tokens) >= self.runner.max_model_len:
            return self._finish(state, Finish("length"), text, token)
        return GenerationEvent(state.id, text, (token,))

    def _clock(self, state: RequestState) -> None:
        now = time.monotonic()
        if state.last_token is None:
            self._observer.on_first_token(now - state.arrived)
        else:
            self._observer.on_next_token(now - state.last_token)
        state.last_token = now

    def _finish(self, state: RequestState, finish: Finish, text: str = "", token: int | None = None) -> GenerationEvent:
        self.scheduler.remove(state)
        del self._requests[state.id]
        if state.request.revision is not None:
            self._residency.unpin(state.request.revision)
        seconds = time.monotonic() - state.arrived
        prompt = len(state.request.prompt_token_ids)
        self._observer.on_finished(finish.reason, seconds, prompt, state.cached, state.num_generated)
        tokens = () if token is None else (token,)
        text += state.detokenizer.finish()
        return GenerationEvent(state.id, text, tokens, finish.reason, finish.error, state.cached)

    def _drop_retired(self) -> None:
        """Zero the idle slots whose revision has left memory."""
        self._clear(self.slots.evict(lambda revision: revision not in self._residency))

    def _clear(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.runner.slots.clear(slot)

    def _fail(self, plan: StepPlan) -> list[GenerationEvent]:
        """End the requests of a failed step, and empty the slots it was filling: they may be half composed, also
        those of requests that had no token in the step."""
        suspect = {fill.revision for fill in plan.fills}
        hit = [chunk.state for chunk in plan.chunks if chunk.state.id in self._requests]
        hit += [state for state in self.scheduler.running if state.request.revision in suspect and state not in hit]
        events = [self._finish(state, Finish("error", STEP_FAILED)) for state in hit]
        self._clear(self.slots.evict(suspect.__contains__))
        return events

    def _report(self, plan: StepPlan, seconds: float) -> None:
        prefilled = [chunk.length for chunk in plan.chunks if chunk.length > 1]
        self._observer.on_step(
            StepReport(
                seconds,
                decode_rows=len(plan.chunks) - len(prefilled),
                prefill_rows=len(prefilled),
                prefill_tokens=sum(prefilled),
                context_tokens=sum(chunk.end for chunk in plan.chunks),
                adapters=len({chunk.state.request.revision for chunk in plan.chunks} - {None}),
            )
        )
