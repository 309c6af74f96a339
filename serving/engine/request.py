"""A request inside the engine: its tokens, its place in the cache, its clock. Knows nothing of scheduling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from serving.engine.detokenizer import Detokenizer
from serving.engine.grammar import Matcher
from serving.types import FinishReason, GenerationRequest, TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class RequestState:
    """What changes while a request runs.

    `tokens` are the prompt's and the generated ones; the first `computed` of them have keys and values in the cache
    blocks of `block_table`, and the full blocks have `block_keys`. `cached` counts the prompt tokens that were in the
    cache when the request was first admitted. Preemption sets `computed` to 0 and frees the blocks, nothing else, so
    that recomputing never samples or emits a token twice. `seed` is the request's own, or one drawn at random.

    `leader` is the state of the row that this one follows; `prompt_done` says that the prompt's keys and values have
    been in the cache, or never will be. `scores` are the prompt's log probabilities so far, `hidden` the sum of its
    last hidden states so far, for requests that want them: such a request reads no cached prefix until it has them.
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
    leader: RequestState | None = None
    prompt_done: bool = False
    matcher: Matcher | None = None
    scores: list[TokenLogprob] = field(default_factory=list)
    hidden: Tensor | None = None

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def remaining(self) -> int:
        """Tokens without keys and values yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def blocked(self) -> bool:
        """Whether it must wait for its leader's prompt."""
        return self.leader is not None and not self.leader.prompt_done

    @property
    def scoring(self) -> bool:
        """Whether log probabilities of the prompt are still to be computed."""
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and len(self.scores) < len(self.request.prompt_token_ids) - 1

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every token of the prompt must be computed, cached or not."""
        return self.scoring or self.request.pooled

    def advance(self, token: int) -> bool:
        """Tell the matcher of a token; False once the text can only end here."""
        return self.matcher is None or self.matcher.advance(token)

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
