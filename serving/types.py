"""The vocabulary of the server: plain messages and the Protocols through which the folders meet.

Imports nothing but the standard library, so that every folder may import it; it knows no tensors and no HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "abort", "error"]
Role = Literal["tenant", "operator"]
StepPhase = Literal["prefill", "decode", "mixed"]

# How a call of a tool is written in the model's text: begin, the name as JSON, middle, the arguments as JSON, end.
TOOL_CALL_BEGIN = '<tool_call>\n{"name": '
TOOL_CALL_MIDDLE = ', "arguments": '
TOOL_CALL_END = "}\n</tool_call>"
MAX_PAGE = 1000  # entries of a list in one answer
StructureKind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "tools"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: a tenant's name, the roles its key carries, and from where (empty for the command line)."""

    tenant: str
    roles: frozenset[Role]
    address: str = ""


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant may use; None is the server's default. `weight` is its share of tokens beside others'."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    queued_requests: int | None = None
    max_tokens: int | None = None
    adapters: int | None = None
    adapter_bytes: int | None = None
    weight: float = 1.0


class TenantDirectory(Protocol):
    """What is known of tenants, at most a second old."""

    def limits(self, tenant: str) -> TenantLimits:
        """The limits set for `tenant`; of one that nobody knows, those of a tenant with none set."""


@dataclass(frozen=True, slots=True)
class Structure:
    """What the text of an answer must match. `text` is, by `kind`: empty for ``json_object``; a JSON schema; a regular
    expression; a JSON list of strings; a grammar in llguidance's Lark; or, for ``tools``, a JSON object of the `tools`
    (objects of `name` and `parameters`, a schema), whether a call is `required`, whether several calls may follow each
    other (`parallel`), and the schema that an `answer` without a call must match, null where any text will do."""

    kind: StructureKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request turns logits into tokens. Ranges are checked where a request enters (`serving/api`).

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 and `min_p` 0 keep every token; `seed` None draws one.
    `max_tokens` counts generated tokens, 0 only scores the prompt; `min_tokens` bans end of text and stop tokens until
    that many are out. `bad_words` are token sequences that are never completed; `allowed_token_ids`, if any, are the
    only ones. `logprobs` and `prompt_logprobs` ask for that many of the likeliest tokens beside each generated token
    and each of the prompt's, of the model's own distribution, before bias, penalties and temperature; 0 for the token
    alone, None for nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structure: Structure | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One row for the engine. `revision` is the full content hash of a resident adapter; None is the base model.

    Rows share cached prefixes within a tenant, a revision and a `cache_salt`. A lower `priority` goes first among the
    waiting of one tenant. `follows` names a row with the same prompt: this one waits until that one's prompt is in the
    cache, and shares it. `pooled` asks for the mean of the prompt's last hidden states instead of tokens. `weight` is
    the tenant's share beside others'; `max_queued` the most rows of the tenant that may wait, None for the engine's.
    """

    request_id: str
    tenant: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    revision: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    follows: str | None = None
    pooled: bool = False
    weight: float = 1.0
    max_queued: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural logarithm of one token's probability. `rank` 1 is the likeliest token; `top` holds the likeliest
    tokens with theirs, likeliest first, as many as were asked for."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationEvent:
    """What one step did for one request.

    `text` is the newly decoded text (may be empty while a character is incomplete), `token_ids` the tokens behind it,
    with their `logprobs` where asked for. `prompt_logprobs`, one for each token of the prompt but the first, come once,
    with the first event; the `embedding` of a pooled request with its only one. The last event of a request has a
    `finish_reason` and says how many of the prompt's tokens were `cached_tokens`, found in the cache; with "error",
    `error` says why in words fit for a stranger.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function by the model: `arguments` are JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call; `parameters` is the JSON text of its arguments' schema."""

    name: str
    description: str
    parameters: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. An assistant's may hold `tool_calls`; one of role ``tool`` answers the call
    `tool_call_id`."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a chat becomes a prompt. `continue_final_message` leaves the last message open instead of beginning a new
    one; `template_arguments` is the JSON text of what the template gets besides, None for nothing."""

    tools: tuple[Tool, ...] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_arguments: str | None = None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the API may say of the base model."""

    base_id: str
    max_model_len: int
    vocab_size: int
    created: int


@dataclass(frozen=True, slots=True)
class RevisionInfo:
    """One immutable content of an adapter. `revision` is the first 16 hex digits of its content hash."""

    revision: str
    bytes: int
    created: int
    resident: bool


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter as its tenant sees it. `shared` ones belong to the operator and are visible to all."""

    name: str
    active_revision: str
    revisions: tuple[RevisionInfo, ...]
    created: int
    shared: bool
    is_default: bool


@dataclass(frozen=True, slots=True)
class DefaultAdapter:
    """What a tenant's requests use when they name none. `revision` None follows the adapter's active revision."""

    name: str
    revision: str | None


class Pin(Protocol):
    """A revision held for one request: it stays resident until `release`, which may be called more than once."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str:
        """The 16 hex digits shown to clients."""

    @property
    def content_hash(self) -> str:
        """The full hash, the key of every memory of this content."""

    def release(self) -> None: ...


HoldingsCheck = Callable[[int, int], None]
"""Raises if a tenant may not have so many adapters, whose revisions take so many bytes."""


class AdapterCatalog(Protocol):
    """Names → revisions, for each tenant. Calls ask a database and may read files: run them off the event loop.

    Where `caller` can be left out it is only for the audit log, which then names the command line or the tenant.

    Errors are `serving.errors`: `ModelNotFound` for what does not exist or is not the caller's (the same words for
    both), `PermissionDenied` for a tenant changing a shared adapter, `InvalidAdapter` and `IncompatibleAdapter`
    for content, `InvalidValue` with param `name` for a name outside the grammar.
    """

    def pin(self, tenant: str, name: str, revision: str | None = None) -> Pin: ...
    def pin_default(self, tenant: str) -> Pin | None:
        """The tenant's default adapter, None if it never set one; `ModelNotFound` once the one it set is deleted."""

    def list(self, tenant: str, limit: int = MAX_PAGE, after: str | None = None) -> Sequence[AdapterInfo]:
        """What the tenant may use, by name: at most `limit`, those `after` a name. `InvalidValue` with param `after`
        for what cannot be a name."""

    def get(self, tenant: str, name: str) -> AdapterInfo: ...
    def add(
        self,
        caller: Caller,
        name: str,
        config: bytes,
        weights: bytes,
        *,
        shared: bool = False,
        within: HoldingsCheck | None = None,
        bank: str | None = None,
    ) -> tuple[AdapterInfo, RevisionInfo, bool]:
        """Validate, store, make active. The flag says whether this content is new under this name; where it is,
        `within` is asked before it counts, and nothing has changed if it raises. `bank`, ``sha256:…``, names the bank
        of an adapter that the caller may use, for `weights` without one; `InvalidAdapter` with param `bank` for any
        other."""

    def add_from_path(
        self, name: str, path: str, *, replace: bool = False, caller: Caller = ...
    ) -> tuple[AdapterInfo, RevisionInfo, bool]:
        """Register a shared adapter from a folder that lies under one of the operator's adapter roots."""

    def activate(self, caller: Caller, name: str, revision: str) -> AdapterInfo: ...
    def delete(self, caller: Caller, name: str) -> None: ...
    def delete_revision(self, caller: Caller, name: str, revision: str) -> None: ...
    def delete_shared(self, name: str, *, caller: Caller = ...) -> None: ...
    def set_default(
        self, tenant: str, name: str | None, revision: str | None = None, *, caller: Caller | None = None
    ) -> DefaultAdapter | None: ...
    def forget(self, caller: Caller, tenant: str) -> None:
        """Remove all adapters of `tenant` and its default; requests that run on them finish."""


class TextCodec(Protocol):
    """Text ↔ tokens of the base model. Thread-safe; slow on long texts: run it off the event loop."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def encode_chat(self, messages: Sequence[Message], options: ChatOptions = ...) -> list[int]:
        """The chat template applied. `InvalidValue` where the template refuses."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, which need not be whole characters."""


class StructureChecker(Protocol):
    """Compiles what answers must match. Slow, and bounded in time and memory: run it off the event loop."""

    def known(self, structure: Structure) -> bool:
        """Whether `check` has accepted this before and need not be called. Returns at once."""

    def check(self, structure: Structure, param: str) -> None:
        """Raise `InvalidValue` with `param` for what cannot be compiled within the limits."""


@dataclass(slots=True)
class EngineStats:
    """Gauges of the engine, read by /metrics and by tests. `prefix_queries` and `prefix_hits` count prompt tokens;
    revisions, by their content hashes, are those of running and of waiting requests."""

    requests_running: int = 0
    requests_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    slots_used: int = 0
    slots_total: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    slot_evictions: int = 0
    running_revisions: frozenset[str] = frozenset()
    waiting_revisions: frozenset[str] = frozenset()


class GenerationStream(Protocol):
    """The events of one request, ending after the one that carries a `finish_reason`."""

    def __aiter__(self) -> AsyncIterator[GenerationEvent]: ...


class EngineClient(Protocol):
    """The engine as the API sees it. Every method returns at once and may be called from the event loop."""

    def submit(self, request: GenerationRequest) -> GenerationStream:
        """Queue a request. `Overloaded` when the server's queue is full, `RateLimitExceeded` when the tenant's is,
        `EngineUnavailable` when the engine is dead, `Draining` when it is shutting down."""

    def abort(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""

    def stats(self) -> EngineStats: ...
    @property
    def healthy(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of the engine: `decode_rows` of one token each, `prefill_rows` of `prefill_tokens` together, over a
    cache of `context_tokens`, with so many different `adapters`."""

    seconds: float
    decode_rows: int
    prefill_rows: int
    prefill_tokens: int
    context_tokens: int
    adapters: int

    @property
    def phase(self) -> StepPhase:
        return "mixed" if self.decode_rows and self.prefill_rows else "prefill" if self.prefill_rows else "decode"


class EngineObserver(Protocol):
    """What the engine reports while it works; `serving/metrics.py` implements it. Called on the engine's thread."""

    def on_admitted(self, waited_seconds: float) -> None: ...
    def on_first_token(self, seconds: float) -> None: ...
    def on_next_token(self, seconds: float) -> None: ...
    def on_finished(
        self,
        tenant: str,
        reason: FinishReason,
        seconds: float,
        prompt_tokens: int,
        cached_tokens: int,
        generated_tokens: int,
    ) -> None: ...
    def on_step(self, step: StepReport) -> None: ...
    def on_compose(self, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the engine needs to start. Lengths are tokens, memory is bytes; None lets the engine choose.

    `model` is a hub id, a folder, a `.gguf` file or ``demo``; `dtype` is ``auto``, ``float32``, ``bfloat16`` or
    ``float16``; `adapter_dtype` is that of the composed A and B, ``auto`` the base model's; `adapter_slots` counts slot
    0 and defaults to `max_batch_size` + 1, so that a request never waits for a slot. `adapter_memory_bytes` bounds what
    adapters that no request uses take in memory. `quantization` is None or ``int8``.
    """

    model: str
    served_model_name: str | None = None
    chat_template: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    max_batch_size: int = 32
    max_model_len: int | None = None
    max_batched_tokens: int = 512
    max_queue: int = 4096
    max_queue_per_tenant: int = 512
    block_size: int = 16
    kv_cache_bytes: int | None = None
    max_rank: int = 16
    adapter_slots: int | None = None
    adapter_memory_bytes: int | None = None
    adapter_dtype: str = "auto"
    quantization: str | None = None
