"""The engine on a thread of its own: requests in, streams of events out. Knows no HTTP and no adapter names.

What crosses between the threads are plain messages, handed over once a step and event loop.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.adapters.residency import Residency
from serving.engine.codec import ModelCodec
from serving.engine.compute import ComputeThread
from serving.engine.core import EngineCore
from serving.engine.grammar import Grammars
from serving.engine.model_runner import ModelRunner
from serving.engine.observer import SilentObserver
from serving.engine.open_requests import RETRY_AFTER_SECONDS, OpenRequests
from serving.engine.streams import AsyncStream, Generation, Sink, collect
from serving.engine.vocabulary import Vocabulary
from serving.errors import (
    ContextLengthExceeded,
    Draining,
    EngineUnavailable,
    InvalidValue,
    ModelNotFound,
    StartupError,
)
from serving.types import (
    EngineObserver,
    EngineSettings,
    EngineStats,
    GenerationEvent,
    GenerationRequest,
    ModelCard,
)
from vblora import kernels
from vblora.checkpoint import AdapterCheckpoint, content_hash, read_adapter
from vblora.errors import VBLoRAError
from vblora.integrations.base_models import DTYPES, BaseModel, cpu_computes, load_base_model

log = logging.getLogger(__name__)

ENGINE_DIED = "the engine stopped"


@dataclass(frozen=True, slots=True)
class _Submit:
    request: GenerationRequest
    arrived: float


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class Engine:
    """One base model and the thread that computes with it. `start` it before submitting; `close` it when done.

    Thread-safe, but for `start` and `close`. `submit` is for a running event loop, `stream` and `generate` for
    plain code.
    """

    def __init__(
        self,
        base: BaseModel,
        settings: EngineSettings,
        *,
        residency: Residency | None = None,
        observer: EngineObserver | None = None,
        compute: ComputeThread | None = None,
    ) -> None:
        if settings.max_batched_tokens < settings.max_batch_size:
            raise StartupError(
                f"max-batched-tokens is {settings.max_batched_tokens}: a step must have room for a token of each of "
                f"the {settings.max_batch_size} requests of max-batch-size"
            )
        self._compute = compute or ComputeThread("engine")
        try:
            runner = self._compute.call(lambda: ModelRunner(base.model, settings))
        except BaseException:
            self._compute.stop()
            raise
        log.info(
            "cache: %d tokens, %d bytes; context: %d tokens; adapter slots: %d, up to %d bytes; compiled kernels: %s",
            runner.num_blocks * runner.block_size,
            runner.num_blocks * runner.block_size * runner.bytes_per_token,
            runner.max_model_len,
            runner.slots.num_slots,
            runner.slots.nbytes,
            "yes" if kernels.available else "not built",
        )
        self.settings = settings
        self.layout = runner.layout
        self.runner = runner
        self.residency = residency or Residency(settings.adapter_memory_bytes)
        ends = _end_of_text(base)
        vocab_size = base.model.get_input_embeddings().get_parameter("weight").shape[0]
        vocabulary = Vocabulary(base.tokenizer, vocab_size, ends)
        self.codec = ModelCodec(base.tokenizer, vocabulary)
        self.grammars = Grammars(vocabulary)
        self.card = ModelCard(
            base_id=settings.served_model_name or base.base_id,
            max_model_len=runner.max_model_len,
            vocab_size=vocab_size,
            created=int(time.time()),
        )
        tokenizer = base.tokenizer.backend_tokenizer
        self._core = EngineCore(
            runner, tokenizer, ends, self.residency, self.grammars, settings, observer or SilentObserver()
        )
        self._inbox: queue.SimpleQueue[_Submit | _Abort | _Stop] = queue.SimpleQueue()
        self._open = OpenRequests(settings, lambda: self._core.running_tenants)
        self._draining = False
        self._started = False
        self._ended = False

    @classmethod
    def from_settings(cls, settings: EngineSettings, observer: EngineObserver | None = None) -> Engine:
        """Load the base model and start the engine. Raises `StartupError` with the reason if it cannot run."""
        dtype = DTYPES.get(settings.dtype)  # None for auto, which takes what there is
        if settings.device == "cpu" and dtype is not None and not cpu_computes(dtype):
            raise StartupError(
                f"dtype is {settings.dtype}, for which this processor has no instructions: use float32 or auto"
            )
        compute = ComputeThread("engine")
        try:
            base = compute.call(
                lambda: load_base_model(
                    settings.model,
                    dtype=settings.dtype,
                    device=settings.device,
                    chat_template=settings.chat_template,
                    progress=log.info,
                )
            )
            engine = cls(base, settings, observer=observer, compute=compute)
        except BaseException as error:
            compute.stop()
            if isinstance(error, VBLoRAError):
                raise StartupError(str(error)) from error
            raise
        engine.start()
        return engine

    def start(self) -> None:
        """Start taking requests."""
        self._started = True
        self._compute.post(self._loop)

    @property
    def healthy(self) -> bool:
        """Whether the engine takes requests."""
        return self._started and not self._ended

    def stats(self) -> EngineStats:
        """The gauges as of now; what is on its way to the engine counts as waiting."""
        stats = self._core.stats()
        stats.requests_waiting = max(stats.requests_waiting, len(self._open) - stats.requests_running)
        return stats

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    @property
    def drained(self) -> bool:
        """Whether no request is left."""
        return not len(self._open)

    def close(self, timeout: float = 10.0) -> None:
        """Stop the thread, after its present step; requests still there end with an error."""
        self._inbox.put(_Stop())
        self._compute.stop(timeout)
        self.grammars.close()

    def submit(self, request: GenerationRequest) -> AsyncStream:
        """Queue a request on the running event loop.

        Raises `Overloaded`, `RateLimitExceeded` (the tenant's queue), `EngineUnavailable`, `Draining`, and
        `InvalidValue` for a prompt that is empty, too long or outside the vocabulary, and `ModelNotFound` when the
        request's revision is not resident.
        """
        stream = AsyncStream()
        self._enqueue(request, stream)
        return stream

    def abort(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        self._inbox.put(_Abort(request_id))

    def stream(self, request: GenerationRequest) -> Iterator[GenerationEvent]:
        """The events of one request, for plain code; leaving the iteration aborts it. Raises as `submit` does."""
        events: queue.SimpleQueue[GenerationEvent] = queue.SimpleQueue()
        self._enqueue(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self.abort(request.request_id)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Run requests together and wait for all. Raises as `submit` does."""
        streams = [queue.SimpleQueue[GenerationEvent]() for _ in requests]
        for request, events in zip(requests, streams, strict=True):
            self._enqueue(request, events.put)
        return [collect(events) for events in streams]

    def load_adapter(self, source: str | Path | AdapterCheckpoint) -> str:
        """Make an adapter resident and return its content hash, a `GenerationRequest`'s `revision`.

        Where `adapter_memory_bytes` bounds memory it may have to go again before a request uses it.
        Raises `vblora.CheckpointError` for a faulty file, `vblora.IncompatibleError` for one that does not fit.
        """
        checkpoint = source if isinstance(source, AdapterCheckpoint) else read_adapter(source)
        digest = content_hash(checkpoint)
        self.residency.put(digest, self.layout.compact(checkpoint))
        return digest

    def _enqueue(self, request: GenerationRequest, stream: AsyncStream | Sink) -> None:
        self._check_tokens(request)
        if self._draining:
            raise Draining("the server is shutting down", retry_after=RETRY_AFTER_SECONDS)
        self._open.add(request, stream, lambda: self._begin(request))

    def _begin(self, request: GenerationRequest) -> None:
        if not self.healthy:
            raise EngineUnavailable("the engine is not running", retry_after=RETRY_AFTER_SECONDS)
        if request.revision is not None:
            try:
                self.residency.pin(request.revision)
            except KeyError:
                raise ModelNotFound("the adapter is not loaded") from None
        self._inbox.put(_Submit(request, time.monotonic()))

    def _check_tokens(self, request: GenerationRequest) -> None:
        """What would hold up or break the step of others never reaches it."""
        prompt, context = request.prompt_token_ids, self.card.max_model_len
        if not prompt:
            raise InvalidValue("the prompt is empty", param="prompt")
        if len(prompt) + request.sampling.max_tokens > context:
            raise ContextLengthExceeded(
                f"the prompt's {len(prompt)} tokens and max_tokens {request.sampling.max_tokens} exceed the context "
                f"of {context} tokens",
                param="max_tokens" if len(prompt) < context else "prompt",
            )
        if not 0 <= min(prompt) <= max(prompt) < self.card.vocab_size:
            raise InvalidValue(f"token ids lie between 0 and {self.card.vocab_size - 1}", param="prompt")

    def _loop(self) -> None:
        """The engine's thread: take messages, run a step, hand over its events."""
        try:
            while self._take_messages():
                if self._core.has_work:
                    self._open.deliver(self._core.step())
        except Exception:
            log.exception("the engine's thread failed")
        finally:
            self._end_all()

    def _take_messages(self) -> bool:
        """Act on all messages there are, waiting for one when there is nothing else to do; False to stop."""
        block = not self._core.has_work
        while block or not self._inbox.empty():
            message = self._inbox.get()
            block = False
            match message:
                case _Submit(request, arrived):
                    self._core.add(request, arrived)
                case _Abort(request_id):
                    self._open.deliver(self._core.abort(request_id))
                case _Stop():
                    return False
            block = not self._core.has_work
        return True

    def _end_all(self) -> None:
        """The thread ends: so does every request, those it never took included."""
        self._ended = True
        requests = self._open.requests()
        for request in requests:
            if request.revision is not None:
                self.residency.unpin(request.revision)
        self._open.deliver([GenerationEvent(r.request_id, finish_reason="error", error=ENGINE_DIED) for r in requests])


def _end_of_text(base: BaseModel) -> frozenset[int]:
    """Every token that the model's files call an end of text."""
    ends: set[int] = set()
    for source in (base.tokenizer, base.model.config, base.model.generation_config):
        value: int | list[int] | None = getattr(source, "eos_token_id", None)
        ends.update([value] if isinstance(value, int) else value or ())
    return frozenset(ends)
