"""Who runs this step: fair between tenants, chunked prefill, preemption by recompute. Knows no tensors."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from serving.adapters.slots import SlotPool
from serving.engine.block_keys import BlockKeys
from serving.engine.blocks import BlockManager
from serving.engine.fairness import ServiceCounters
from serving.engine.request import Chunk, Fill, RequestState, StepPlan

GENERATED_TOKEN_COST = 2  # a token of service counts 1 when it is prefilled, 2 when it is generated
CROWDING = 4  # one part in so many of a step's prompts is the most for who crowds others: they wait for that step
SCORED_TOKENS = 128  # of prompts whose log probabilities are wanted, in one step: each is a row over the vocabulary


class Scheduler:
    """Continuous batching of at most `max_batch_size` requests and `max_batched_tokens` tokens a step.

    Waiting requests are admitted from the tenant that has been served least for its weight (`fairness.py`); within a
    tenant by priority and then first come first served, but for rows that wait for another row's prompt. A tenant that
    has less than its part of a full batch's rows takes one from a tenant that has more. The room for prompts in a step
    is shared by weight too. When the cache is full the newest running request of the tenant that has been served
    most is preempted, never the oldest of all, so that one always progresses: the cache must hold one request of full
    length. A request does not compute what its tenant and revision have left in the cache.
    """

    def __init__(self, blocks: BlockManager, slots: SlotPool, *, max_batch_size: int, max_batched_tokens: int) -> None:
        self.blocks = blocks
        self.slots = slots
        self.max_batch_size = max_batch_size
        self.max_batched_tokens = max_batched_tokens
        self.running: list[RequestState] = []
        self.service = ServiceCounters()
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._keys = BlockKeys(blocks.block_size)
        self._waiting: dict[str, list[RequestState]] = {}
        self._fills: list[Fill] = []
        self._parts: dict[str, float] = {}  # of the rows, by tenant, of those that have requests in this step
        self._some_sat_out = False

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._waiting)

    def add(self, state: RequestState) -> None:
        """Queue a request."""
        tenant = state.request.tenant
        self.service.weigh(tenant, state.request.weight)
        if tenant not in self._waiting:
            self.service.join(tenant, self._waiting, {state.request.tenant for state in self.running})
            self._waiting[tenant] = []
        insort(self._waiting[tenant], state, key=_turn)

    def schedule(self) -> StepPlan:
        """Choose the chunks of the next step, with blocks and slots for all of them."""
        self._parts = self.service.parts(self.max_batch_size, dict.fromkeys([*self._rows(), *self._waiting]))
        chunks = self._decode()
        self._admit()
        # a row that went for another tenant's may even have come back, with less of it computed
        chunks = [chunk for chunk in chunks if chunk.state in self.running and chunk.start == chunk.state.computed]
        within = set(self._within_parts())
        crowding = self._crowding(within)
        sit_out = self._sit_out(crowding, within)
        chunks = [chunk for chunk in chunks if chunk.state.request.tenant not in sit_out]
        decoding = {chunk.state.order for chunk in chunks}
        prompts = [s for s in self.running if s.order not in decoding and s.request.tenant not in sit_out]
        chunks += self._prefill(prompts, self.max_batched_tokens - len(chunks), crowding)
        chunks.sort(key=lambda chunk: chunk.length > 1)
        for chunk in chunks:
            if chunk.samples:
                self.service.charge(chunk.state.request.tenant, GENERATED_TOKEN_COST)
        fills, self._fills = tuple(self._fills), []
        return StepPlan(tuple(chunks), fills)

    def _decode(self) -> list[Chunk]:
        """The next token of every request that is past its prompt, oldest first, as far as there are blocks."""
        chunks = []
        for state in sorted(self.running, key=lambda state: state.order):
            # one preempted by an older one is no longer there
            if state.remaining == 1 and state in self.running:
                chunk = Chunk(state, state.computed, 1)
                if self._make_room(chunk):
                    chunks.append(chunk)
        return chunks

    def _crowding(self, within: set[str]) -> set[str]:
        """Tenants with more than their part of the rows and a queue besides, while others run that are `within` theirs
        with all they want."""
        rows = self._rows()
        if rows.keys().isdisjoint(within):
            return set()
        return {tenant for tenant in self._waiting if rows[tenant] > self._parts[tenant]}

    def _sit_out(self, crowding: set[str], within: set[str]) -> set[str]:
        """Those of the `crowding` that have no part in this step: all, when it reads the prompt of one `within` its
        part, which so waits for one of their steps at most; but never twice in a row."""
        due = any(not state.prompt_done and state.request.tenant in within for state in self.running)
        self._some_sat_out = due and bool(crowding) and not self._some_sat_out
        return crowding if self._some_sat_out else set()

    def _prefill(self, states: Sequence[RequestState], budget: int, crowding: Collection[str]) -> list[Chunk]:
        """Share `budget` tokens among the tenants of `states`, by weight; each of the `crowding` gets little."""
        states = sorted(states, key=lambda state: state.order)
        wanted = {state.order: state.remaining for state in states}
        scoring = [state for state in states if state.scoring]
        for tenant, tokens in self._share(scoring, wanted, SCORED_TOKENS, {}).items():
            _cut([state for state in scoring if state.request.tenant == tenant], wanted, tokens)
        chunks = []
        most = dict.fromkeys(crowding, max(1, budget // CROWDING))
        for tenant, tokens in self._share(states, wanted, budget, most).items():
            chunks += _read([state for state in states if state.request.tenant == tenant], wanted, tokens)
        return chunks

    def _share(
        self, states: Sequence[RequestState], wanted: Mapping[int, int], tokens: int, most: Mapping[str, int]
    ) -> dict[str, int]:
        """Of `tokens`, each tenant's by weight: what its `states` have `wanted`, and no more than its `most`."""
        demands: Counter[str] = Counter()
        for state in states:
            demands[state.request.tenant] += wanted[state.order]
        return self.service.shares(tokens, {t: min(demand, most.get(t, demand)) for t, demand in demands.items()})

    def commit(self, plan: StepPlan) -> None:
        """The step has run: its tokens have keys and values, and the blocks that it filled may be shared."""
        for chunk in plan.chunks:
            state = chunk.state
            state.computed = chunk.end
            state.prompt_done = state.prompt_done or chunk.end >= len(state.request.prompt_token_ids)
            self._keys.extend(state.block_keys, state.request, state.tokens)
            size = self.blocks.block_size
            for index in range(chunk.start // size, chunk.end // size):
                self.blocks.keep(state.block_table[index], state.block_keys[index])

    def _make_room(self, chunk: Chunk) -> bool:
        """Give the chunk its blocks, preempting for them; False if it had to go itself."""
        while not self.blocks.can_grow(chunk.state.block_table, chunk.end):
            _, *others = sorted(self.running, key=lambda state: state.order)
            victim = max(others or self.running, key=lambda state: (self.service[state.request.tenant], state.order))
            self.preempt(victim)
            if victim is chunk.state:
                return False
        self.blocks.grow(chunk.state.block_table, chunk.end)
        return True

    def _admit(self) -> None:
        """Take waiting requests while rows, slots and blocks for their whole text so far are there.

        Who asks for more than its part of the rows waits for its turn, which is what the bound of `ServiceCounters` is
        about. Who does not need not wait until others have been served as much.
        """
        while (state := self._next()) is not None and self._enter(state):
            pass
        for state in [state for tenant in self._within_parts() for state in self._waiting.get(tenant, ())]:
            if not state.blocked and not self._enter(state):
                break

    def _enter(self, state: RequestState) -> bool:
        """Let a waiting request run, on another's row if need be."""
        while not self._take(state):
            if not self._give_way(state.request.tenant):
                return False
        return True

    def _next(self) -> RequestState | None:
        """The request whose turn it is: the least served tenant's first that waits for no other row."""
        rows = self._rows()
        firsts = (next((s for s in queue if not s.blocked), None) for queue in self._waiting.values())

        def turn(state: RequestState) -> tuple[float, int, int]:
            tenant = state.request.tenant
            return self.service[tenant], rows[tenant], state.order

        return min((state for state in firsts if state is not None), key=turn, default=None)

    def _rows(self) -> Counter[str]:
        return Counter(state.request.tenant for state in self.running)

    def _within_parts(self) -> list[str]:
        """Tenants whose rows and what they have waiting are no more than their part of the rows together."""
        rows = self._rows()
        counts = ((tenant, rows[tenant] + len(self._waiting.get(tenant, ()))) for tenant in self._parts)
        return [tenant for tenant, count in counts if count <= self._parts[tenant]]

    def _take(self, state: RequestState) -> bool:
        """Let a waiting request run, if there is room; charge its prompt, the first time."""
        if len(self.running) >= self.max_batch_size:
            return False
        self._reuse(state)
        if not self.blocks.can_grow(state.block_table, len(state.tokens)) or not self._take_slot(state):
            self.blocks.release(state.block_table)
            state.computed = 0
            return False
        self.blocks.grow(state.block_table, len(state.tokens))
        self._count_prefix(state)
        if not state.preemptions:
            self.service.charge(state.request.tenant, len(state.tokens) - state.computed)
        self._dequeue(state)
        self.running.append(state)
        return True

    def _give_way(self, tenant: str) -> bool:
        """Preempt the newest row of the tenant that has been served most, among those with more than their part of the
        rows, for a `tenant` that has room in its own. False when there is no such row.

        What the row had computed is mostly still in the prefix cache when it comes back.
        """
        rows = self._rows()
        over = [other for other, count in rows.items() if count > self._parts[other]]
        if not over or rows[tenant] + 1 > self._parts[tenant]:
            return False
        most = max(over, key=lambda other: self.service[other])
        newest = max((state for state in self.running if state.request.tenant == most), key=lambda state: state.order)
        self.preempt(newest)
        return True

    def _reuse(self, state: RequestState) -> None:
        """Take the cached blocks that the request's tokens begin with; its last token is computed in any case."""
        self._keys.extend(state.block_keys, state.request, state.tokens)
        usable = 0 if state.needs_whole_prompt else (len(state.tokens) - 1) // self.blocks.block_size
        state.computed = self.blocks.share(state.block_table, state.block_keys[:usable]) * self.blocks.block_size

    def _count_prefix(self, state: RequestState) -> None:
        if not state.preemptions and not state.needs_whole_prompt:
            state.cached = state.computed
            self.prefix_queries += len(state.tokens)
            self.prefix_hits += state.cached

    def _take_slot(self, state: RequestState) -> bool:
        revision = state.request.revision
        if revision is None:
            return True
        slot = self.slots.acquire(revision)
        if slot is None:
            return False
        state.slot = slot.index
        if slot.fresh:
            self._fills.append(Fill(slot.index, revision))
        return True

    def preempt(self, state: RequestState) -> None:
        """Take a running request's blocks and slot; it waits, before what came after it, to be recomputed."""
        self._leave(state)
        state.computed = 0
        state.hidden = None
        state.preemptions += 1
        self.preemptions += 1
        self.add(state)

    def remove(self, state: RequestState) -> None:
        """Forget a request, running or waiting, and free what it holds."""
        if state in self.running:
            self._leave(state)
        else:
            self._dequeue(state)
        state.prompt_done = True

    def _leave(self, state: RequestState) -> None:
        self.running.remove(state)
        self.blocks.release(state.block_table)
        if state.request.revision is not None:
            self.slots.release(state.request.revision)
            state.slot = 0

    def _dequeue(self, state: RequestState) -> None:
        tenant = state.request.tenant
        self._waiting[tenant].remove(state)
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self.service.leave(tenant)


def _turn(state: RequestState) -> tuple[int, int]:
    """Orders the waiting of one tenant."""
    return state.request.priority, state.order


def _cut(states: Sequence[RequestState], wanted: dict[int, int], tokens: int) -> None:
    """Let `states` want no more than `tokens` together, the oldest first."""
    for state in states:
        wanted[state.order] = min(wanted[state.order], tokens)
        tokens -= wanted[state.order]


def _read(states: Sequence[RequestState], wanted: dict[int, int], budget: int) -> list[Chunk]:
    """One tenant's part of a step's prompts: the shortest rest first, so that a short prompt need not wait for a long
    one; but half is the oldest's, so that none waits for ever. `states` are its requests, oldest first."""
    oldest, *others = states
    left = budget - min(wanted[oldest.order], (budget + 1) // 2)
    chunks = []
    for state in sorted(others, key=lambda state: (state.remaining, state.order)):
        length = min(wanted[state.order], left)
        left -= length
        if length:
            chunks.append(Chunk(state, state.computed, length))
    spared = min(wanted[oldest.order], budget - sum(chunk.length for chunk in chunks))
    return [Chunk(oldest, oldest.computed, spared), *chunks] if spared else chunks
