"""One step of the engine, and the requests it moves on: schedule, run, sample, commit, publish.

Runs on one thread and knows nothing of others, of event loops or of HTTP.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tokenizers import Tokenizer
from torch import Tensor

from serving.adapters.residency import Residency
from serving.adapters.slots import SlotPool
from serving.engine.blocks import BlockManager
from serving.engine.detokenizer import Detokenizer
from serving.engine.grammar import Grammars
from serving.engine.logprobs import token_logprobs
from serving.engine.model_runner import ModelRunner, StepOutput
from serving.engine.request import Finish, RequestState, StepPlan
from serving.engine.sampler import sample
from serving.engine.scheduler import Scheduler
from serving.types import (
    EngineObserver,
    EngineSettings,
    EngineStats,
    GenerationEvent,
    GenerationRequest,
    StepReport,
    TokenLogprob,
)

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
        grammars: Grammars,
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
        self._grammars = grammars
        self._observer = observer
        self._requests: dict[str, RequestState] = {}
        self._order = itertools.count()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def running_tenants(self) -> list[str]:
        """The tenant of each running request. May be read on any thread."""
        return [state.request.tenant for state in tuple(self.scheduler.running)]

    def stats(self) -> EngineStats:
        """The gauges as of now. May be read on any thread."""
        running = _revisions(tuple(self.scheduler.running))
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
            slot_evictions=self.slots.evictions,
            running_revisions=running,
            waiting_revisions=_revisions(self._requests.copy().values()) - running,
        )

    def add(self, request: GenerationRequest, arrived: float) -> None:
        """Queue a request, whose revision must be pinned in the residency until it ends."""
        params = request.sampling
        detokenizer = Detokenizer(
            self._tokenizer,
            request.prompt_token_ids,
            stop=params.stop,
            skip_special_tokens=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
        )
        seed = secrets.randbits(63) if params.seed is None else params.seed
        state = RequestState(
            request,
            detokenizer,
            seed,
            arrived,
            next(self._order),
            tokens=list(request.prompt_token_ids),
            leader=None if request.follows is None else self._requests.get(request.follows),
            matcher=None if params.structure is None else self._grammars.matcher(params.structure),
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
            output = self.runner.run(plan)
            self._note_prompts(output)
            tokens = sample(output.logits, plan.sampling, self._end_of_text)
            events = self._commit(plan, tokens, self._score(plan, output.logits, tokens))
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

    def _note_prompts(self, output: StepOutput) -> None:
        """Keep what the step found out about prompts, for requests that want it."""
        for chunk, logits in output.scored:
            state, top = chunk.state, chunk.state.request.sampling.prompt_logprobs or 0
            # Row i predicts token start + i + 1; what a preempted request computes again is known already.
            first = len(state.scores) + 1
            targets = state.request.prompt_token_ids[first : chunk.end + 1]
            rows = logits[first - chunk.start - 1 :][: len(targets)]
            state.scores += token_logprobs(rows, targets, [top] * len(targets))
        for state, hidden in output.hidden:
            state.hidden = hidden if state.hidden is None else state.hidden + hidden

    def _score(self, plan: StepPlan, logits: Tensor, tokens: Sequence[int | None]) -> dict[str, TokenLogprob]:
        """By request, the log probability of its new token where it wants that."""
        wanted = [
            (row, state.id, token, top)
            for row, (state, token) in enumerate(zip(plan.sampling, tokens, strict=True))
            if (top := state.request.sampling.logprobs) is not None and token is not None
        ]
        if not wanted:
            return {}
        rows, ids, chosen, tops = zip(*wanted, strict=True)
        return dict(zip(ids, token_logprobs(logits[list(rows)], chosen, tops), strict=True))

    def _commit(
        self, plan: StepPlan, tokens: Sequence[int | None], scores: Mapping[str, TokenLogprob]
    ) -> list[GenerationEvent]:
        """Record what the step computed; returns an event for every request that got a token."""
        self.scheduler.commit(plan)
        return [
            self._take(state, token, scores.get(state.id)) for state, token in zip(plan.sampling, tokens, strict=True)
        ]

    def _take(self, state: RequestState, token: int | None, score: TokenLogprob | None) -> GenerationEvent:
        params = state.request.sampling
        if params.max_tokens == 0:
            return self._finish(state, Finish("length"))
        if token is None:
            why = state.matcher.error if state.matcher is not None else None
            return self._finish(state, Finish("error", why or NOT_FINITE))
        state.tokens.append(token)
        self._clock(state)
        ends = token in params.stop_token_ids or (token in self._end_of_text and not params.ignore_eos)
        hidden = ends and not (params.include_stop_str_in_output and token in params.stop_token_ids)
        text = "" if hidden else state.detokenizer.push(token)
        event = GenerationEvent(state.id, text, (token,), logprobs=() if score is None else (score,))
        if ends or state.detokenizer.stopped or not state.advance(token):
            return self._finish(state, Finish("stop"), event)
        if state.num_generated >= params.max_tokens or len(state.tokens) >= self.runner.max_model_len:
            return self._finish(state, Finish("length"), event)
        return replace(event, prompt_logprobs=tuple(state.scores)) if state.num_generated == 1 else event

    def _clock(self, state: RequestState) -> None:
        now = time.monotonic()
        if state.last_token is None:
            self._observer.on_first_token(now - state.arrived)
        else:
            self._observer.on_next_token(now - state.last_token)
        state.last_token = now

    def _finish(self, state: RequestState, finish: Finish, event: GenerationEvent | None = None) -> GenerationEvent:
        """End a request; `event` is what the step did for it."""
        event = event or GenerationEvent(state.id)
        self.scheduler.remove(state)
        del self._requests[state.id]
        if state.request.revision is not None:
            self._residency.unpin(state.request.revision)
        seconds = time.monotonic() - state.arrived
        prompt = len(state.request.prompt_token_ids)
        # A prompt with several answers counts once.
        counted, cached = (prompt, state.cached) if state.request.follows is None else (0, 0)
        self._observer.on_finished(state.request.tenant, finish.reason, seconds, counted, cached, state.num_generated)
        return replace(
            event,
            text=event.text + state.detokenizer.finish(),
            finish_reason=finish.reason,
            error=finish.error,
            cached_tokens=cached,
            prompt_logprobs=tuple(state.scores) if state.num_generated <= 1 else (),
            embedding=() if state.hidden is None else tuple((state.hidden / prompt).tolist()),
        )

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


def _revisions(states: Iterable[RequestState]) -> frozenset[str]:
    return frozenset(state.request.revision for state in states if state.request.revision is not None)
