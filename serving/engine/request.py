"""A request inside the engine: its tokens, its place in the cache, its clock. Knows nothing of scheduling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from serving.engine.detokenizer import Detokenizer
from serving.types import FinishReason, GenerationRequest


@dataclass(slots=True, eq=False)
class RequestState:
    """What changes while a request runs.

    `tokens` are the prompt's and the generated ones; the first `computed` of them have keys and values in the cache
    blocks of `block_table`, and the full blocks have `block_keys`. `cached` counts the prompt tokens that were in the
    cache when the request was first admitted. Preemption sets `computed` to 0 and frees the blocks, nothing else, so
    that recomputing never samples or emits a token twice. `seed` is the request's own, or one drawn at random.
    """

    request: GenerationRequest
    detokenizer: Detokenizer
    seed: int
    arrived: float
    order: int
    tokens: list[int]
    computed: int = 0
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    cached: int = 0
    slot: int = 0
    admitted: float | None = None
    last_token: float | None = None
    preemptions: int = 0

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def remaining(self) -> int:
        """Tokens without keys and values yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt_token_ids) :]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)


class Chunk(NamedTuple):
    """The next `length` tokens of a request, from `start`; `samples` when they are its last."""

    state: RequestState
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def samples(self) -> bool:
        return self.end == len(self.state.tokens)


@dataclass(frozen=True, slots=True)
class Fill:
    """A revision to compose into a slot before the step runs."""

    slot: int
    revision: str


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes: decode rows first, then prefill chunks; and the slots to fill before."""

    chunks: tuple[Chunk, ...]
    fills: tuple[Fill, ...]

    @property
    def sampling(self) -> list[RequestState]:
        """The requests that get a token, in the order of the logits' rows."""
        return [chunk.state for chunk in self.chunks if chunk.samples]


@dataclass(frozen=True, slots=True)
class Finish:
    """How a request ended."""

    reason: FinishReason
    error: str | None = None
