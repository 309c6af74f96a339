"""Who runs this step: fair between tenants, chunked prefill, preemption by recompute. Knows no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from serving.adapters.slots import SlotPool
from serving.engine.block_keys import BlockKeys
from serving.engine.blocks import BlockManager
from serving.engine.request import Chunk, Fill, RequestState, StepPlan

GENERATED_TOKEN_COST = 2  # a token of service counts 1 when it is prefilled, 2 when it is generated


class Scheduler:
    """Continuous batching of at most `max_batch_size` requests and `max_batched_tokens` tokens a step.

    Waiting requests are admitted from the tenant that has been served least (the virtual token counter of Sheng et
    al., "Fairness in Serving Large Language Models", arXiv 2401.00588), first come first served within a tenant. When
    the cache is full the newest running request is preempted, so the oldest always progresses: the cache must hold
    one request of full length. A request does not compute what its tenant and revision have left in the cache.
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
        self._waiting: dict[str, deque[RequestState]] = {}
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
        self._tenant_queue(state.request.tenant).append(state)

    def _tenant_queue(self, tenant: str) -> deque[RequestState]:
        """A tenant that was idle starts level with the least served busy one: idleness earns no credit."""
        if tenant not in self._waiting:
            busy = {*self._waiting, *(state.request.tenant for state in self.running)} - {tenant}
            floor = min((self._served[other] for other in busy if other in self._served), default=0)
            self._served[tenant] = max(self._served.get(tenant, 0), floor)
            self._waiting[tenant] = deque()
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
        left = budget - min(oldest.remaining, (budget + 1) // 2)
        chunks = []
        for state in sorted(others, key=lambda state: (state.remaining, state.order)):
            length = min(state.remaining, left)
            left -= length
            if length:
                chunks.append(Chunk(state, state.computed, length))
        spared = budget - sum(chunk.length for chunk in chunks)
        return [Chunk(oldest, oldest.computed, min(oldest.remaining, spared)), *chunks] if spared else chunks

    def commit(self, plan: StepPlan) -> None:
        """The step has run: its tokens have keys and values, and the blocks that it filled may be shared."""
        for chunk in plan.chunks:
            state = chunk.state
            state.computed = chunk.end
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
        while self._waiting and len(self.running) < self.max_batch_size:
            tenant = min(self._waiting, key=lambda name: self._served[name])
            state = self._waiting[tenant][0]
            self._reuse(state)
            if not self.blocks.can_grow(state.block_table, len(state.tokens)) or not self._take_slot(state):
                self.blocks.release(state.block_table)
                state.computed = 0
                break
            self.blocks.grow(state.block_table, len(state.tokens))
            self._count_prefix(state)
            self._dequeue(tenant, state)
            self.running.append(state)

    def _reuse(self, state: RequestState) -> None:
        """Take the cached blocks that the request's tokens begin with; its last token is computed in any case."""
        self._keys.extend(state.block_keys, state.request, state.tokens)
        usable = (len(state.tokens) - 1) // self.blocks.block_size
        state.computed = self.blocks.share(state.block_table, state.block_keys[:usable]) * self.blocks.block_size

    def _count_prefix(self, state: RequestState) -> None:
        if not state.preemptions:
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
        """Take a running request's blocks and slot; it waits, first of its tenant's queue, to be recomputed."""
        self._leave(state)
        state.computed = 0
        state.preemptions += 1
        self.preemptions += 1
        self._tenant_queue(state.request.tenant).appendleft(state)

    def remove(self, state: RequestState) -> None:
        """Forget a request, running or waiting, and free what it holds."""
        if state in self.running:
            self._leave(state)
        else:
            self._dequeue(state.request.tenant, state)

    def _leave(self, state: RequestState) -> None:
        self.running.remove(state)
        self.blocks.release(state.block_table)
        if state.request.revision is not None:
            self.slots.release(state.request.revision)
            state.slot = 0

    def _dequeue(self, tenant: str, state: RequestState) -> None:
        self._waiting[tenant].remove(state)
        if not self._waiting[tenant]:
            del self._waiting[tenant]
