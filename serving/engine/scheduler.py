"""Who runs this step: fair between tenants, chunked prefill, preemption by recompute. Knows no tensors."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Sequence

from serving.adapters.slots import SlotPool
from serving.engine.block_keys import BlockKeys
from serving.engine.blocks import BlockManager
from serving.engine.request import Chunk, Fill, RequestState, StepPlan

GENERATED_TOKEN_COST = 2  # a token of service counts 1 when it is prefilled, 2 when it is generated
SCORED_TOKENS = 128  # of prompts whose log probabilities are wanted, in one step: each is a row over the vocabulary


class Scheduler:
    """Continuous batching of at most `max_batch_size` requests and `max_batched_tokens` tokens a step.

    Waiting requests are admitted from the tenant that has been served least (the virtual token counter of Sheng et
    al., "Fairness in Serving Large Language Models", arXiv 2401.00588); within a tenant by priority and then first come
    first served, but for rows that wait for another row's prompt. When the cache is full the newest running request is
    preempted, so the oldest always progresses: the cache must hold one request of full length. A request does not
    compute what its tenant and revision have left in the cache.
    """

    def __init__(self, blocks: BlockManager, slots: SlotPool, *, max_batch_size: int, max_batched_tokens: int) -> None:
        self.blocks = blocks
        self.slots = slots
        self.max_batch_size = max_batch_size
        self.max_batched_tokens = max_batched_tokens
        self.running: list[RequestState] = []
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._keys = BlockKeys(blocks.block_size)
        self._waiting: dict[str, list[RequestState]] = {}
        self._served: dict[str, int] = {}
        self._fills: list[Fill] = []

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._waiting)

    def add(self, state: RequestState) -> None:
        """Queue a request."""
        insort(self._tenant_queue(state.request.tenant), state, key=_turn)

    def _tenant_queue(self, tenant: str) -> list[RequestState]:
        """A tenant that was idle starts level with the least served busy one: idleness earns no credit."""
        if tenant not in self._waiting:
            busy = {*self._waiting, *(state.request.tenant for state in self.running)} - {tenant}
            floor = min((self._served[other] for other in busy if other in self._served), default=0)
            self._served[tenant] = max(self._served.get(tenant, 0), floor)
            self._waiting[tenant] = []
        return self._waiting[tenant]

    def schedule(self) -> StepPlan:
        """Choose the chunks of the next step, with blocks and slots for all of them."""
        chunks = self._decode()
        self._admit()
        chunks += self._prefill({chunk.state.order for chunk in chunks}, self.max_batched_tokens - len(chunks))
        chunks.sort(key=lambda chunk: chunk.length > 1)
        for chunk in chunks:
            self._charge(chunk)
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
        return [chunk for chunk in chunks if chunk.state in self.running]

    def _prefill(self, decoding: Collection[int], budget: int) -> list[Chunk]:
        """Share `budget` tokens among the requests that are not `decoding` (their orders): the shortest rest first, so
        that a short prompt need not wait for a long one; but half is the oldest's, so that none waits for ever."""
        states = [state for state in self.running if state.order not in decoding]
        if not states:
            return []
        oldest, *others = sorted(states, key=lambda state: state.order)
        wanted = _wanted([oldest, *others])
        left = budget - min(wanted[oldest.order], (budget + 1) // 2)
        chunks = []
        for state in sorted(others, key=lambda state: (state.remaining, state.order)):
            length = min(wanted[state.order], left)
            left -= length
            if length:
                chunks.append(Chunk(state, state.computed, length))
        spared = budget - sum(chunk.length for chunk in chunks)
        return [Chunk(oldest, oldest.computed, min(wanted[oldest.order], spared)), *chunks] if spared else chunks

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
        """Give the chunk its blocks, preempting newer requests for them; False if it had to go itself."""
        while not self.blocks.can_grow(chunk.state.block_table, chunk.end):
            newest = max(self.running, key=lambda state: state.order)
            self.preempt(newest)
            if newest is chunk.state:
                return False
        self.blocks.grow(chunk.state.block_table, chunk.end)
        return True

    def _admit(self) -> None:
        """Take waiting requests while rows, slots and blocks for their whole text so far are there."""
        while len(self.running) < self.max_batch_size and (state := self._next()):
            self._reuse(state)
            if not self.blocks.can_grow(state.block_table, len(state.tokens)) or not self._take_slot(state):
                self.blocks.release(state.block_table)
                state.computed = 0
                break
            self.blocks.grow(state.block_table, len(state.tokens))
            self._count_prefix(state)
            self._dequeue(state)
            self.running.append(state)

    def _next(self) -> RequestState | None:
        """The request whose turn it is: the least served tenant's first that waits for no other row."""
        ready = {tenant: next((s for s in queue if not s.blocked), None) for tenant, queue in self._waiting.items()}
        turns = [(self._served[tenant], tenant) for tenant, state in ready.items() if state is not None]
        return ready[min(turns, key=lambda turn: turn[0])[1]] if turns else None

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

    def _charge(self, chunk: Chunk) -> None:
        """Count the service given; what a preemption makes us compute again is not the tenant's to pay."""
        request = chunk.state.request
        prompt = max(0, min(chunk.end, len(request.prompt_token_ids)) - chunk.start)
        prefilled = 0 if chunk.state.preemptions else prompt
        self._served[request.tenant] += prefilled + (GENERATED_TOKEN_COST if chunk.samples else 0)

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


def _turn(state: RequestState) -> tuple[int, int]:
    """Orders the waiting of one tenant."""
    return state.request.priority, state.order


def _wanted(states: Sequence[RequestState]) -> dict[int, int]:
    """By the orders of `states`, oldest first: how much of its prompt each could use in this step. Those that want log
    probabilities share `SCORED_TOKENS`."""
    wanted, left = {}, SCORED_TOKENS
    for state in states:
        wanted[state.order] = min(state.remaining, left) if state.scoring else state.remaining
        left -= wanted[state.order] if state.scoring else 0
    return wanted
