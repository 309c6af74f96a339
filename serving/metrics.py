"""Prometheus metrics: what the engine and the routes report, and gauges read at each scrape.

Labels are bounded: never an adapter's name, and a tenant's only where the operator wants it. Knows no HTTP and no
engine, only the Protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.types import EngineStats, FinishReason, StepReport
from serving.vllm_metrics import VllmGauges

PREFIX = "vblora_"
REJECTIONS = frozenset({"rate_limit_exceeded", "overloaded", "draining", "engine_unavailable"})
MOST_TENANTS = 1000  # that have series of their own; the others share one
OTHER_TENANTS = "(other)"
_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_COMPOSE = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05)


@dataclass(frozen=True, slots=True)
class AdapterGauges:
    """Adapters at this moment, and how many had to leave memory. `resident_bytes` are metadata without banks."""

    registered: int
    resident: int
    resident_bytes: int
    banks: int
    bank_bytes: int
    evictions: int


class Metrics:
    """Implements `serving.types.EngineObserver` and `serving.api.context.ApiObserver`. Thread-safe."""

    def __init__(self, registry: CollectorRegistry, *, tenant_label: bool = False, vllm: bool = False) -> None:
        """With `tenant_label` the counters of requests and tokens tell tenants apart; with `vllm` its gauges come
        too."""
        self.registry = registry
        self._vllm = vllm
        self._tenants: set[str] | None = set() if tenant_label else None
        tenant = ("tenant",) if tenant_label else ()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.last_step = (0, 0)
        self._finished = self._counter("request_success", "Requests that ended.", "finished_reason", *tenant)
        self._errors = self._counter("request_errors", "Requests that failed.", "code")
        self._rejections = self._counter("admission_rejections", "Requests refused for lack of room.", "reason")
        self._quota_errors = self._counter("quota_storage_errors", "Failures of the Redis that keeps quotas.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were answered.", *tenant)
        self._cached_tokens = self._counter(
            "cached_prompt_tokens", "Of these, tokens found in the prefix cache.", *tenant
        )
        self._generated = self._counter("generation_tokens", "Tokens generated.", *tenant)
        self._queue = self._histogram("request_queue_time_seconds", "From submission to admission.", _LATENCY)
        self._first = self._histogram("time_to_first_token_seconds", "From submission to the first token.", _LATENCY)
        self._gap = self._histogram("inter_token_latency_seconds", "Between tokens of a request.", _TOKEN_GAP)
        self._total = self._histogram("e2e_request_latency_seconds", "From submission to the last token.", _LATENCY)
        self._step = self._histogram("step_duration_seconds", "One step of the engine.", _LATENCY, "phase")
        self._compose = self._histogram("adapter_compose_seconds", "Composing one revision into a slot.", _COMPOSE)
        self._load = self._histogram("adapter_load_seconds", "Reading and validating an adapter.", _LATENCY, "source")

    def watch(self, engine: Callable[[], EngineStats], adapters: Callable[[], AdapterGauges]) -> None:
        """Read these at each scrape from now on."""
        self.registry.register(_Gauges(self, engine, adapters))
        if self._vllm:
            self.registry.register(VllmGauges(engine))

    def on_admitted(self, waited_seconds: float) -> None:
        self._queue.observe(waited_seconds)

    def on_first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def on_next_token(self, seconds: float) -> None:
        self._gap.observe(seconds)

    def on_finished(
        self,
        tenant: str,
        reason: FinishReason,
        seconds: float,
        prompt_tokens: int,
        cached_tokens: int,
        generated_tokens: int,
    ) -> None:
        self._total.observe(seconds)
        label = self._label(tenant)
        self._finished.labels(reason, *label).inc()
        for counter, tokens in (
            (self._prompt_tokens, prompt_tokens),
            (self._cached_tokens, cached_tokens),
            (self._generated, generated_tokens),
        ):
            (counter.labels(*label) if label else counter).inc(tokens)

    def _label(self, tenant: str) -> tuple[str, ...]:
        if self._tenants is None:
            return ()
        if len(self._tenants) < MOST_TENANTS:
            self._tenants.add(tenant)
        return (tenant if tenant in self._tenants else OTHER_TENANTS,)

    def on_step(self, step: StepReport) -> None:
        self.last_step = (step.decode_rows + step.prefill_rows, step.adapters)
        self._step.labels(step.phase).observe(step.seconds)

    def on_compose(self, seconds: float) -> None:
        self._compose.observe(seconds)

    def on_error(self, code: str, reason: str | None = None) -> None:
        """A request was answered with the error `code`; `reason` is the limit that refused it, if one did."""
        self._errors.labels(code).inc()
        if code in REJECTIONS:
            self._rejections.labels(reason or code).inc()

    def on_quota_storage_error(self) -> None:
        """The Redis that keeps quotas failed."""
        self._quota_errors.inc()

    def on_adapter_loaded(self, source: str, seconds: float) -> None:
        """An adapter was taken in, from ``upload`` or ``path``."""
        self._load.labels(source).observe(seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)


class _Gauges(Collector):
    """The gauges of one scrape. While nothing runs there is no batch, whatever the last step was."""

    def __init__(
        self, metrics: Metrics, engine: Callable[[], EngineStats], adapters: Callable[[], AdapterGauges]
    ) -> None:
        self._metrics = metrics
        self._engine = engine
        self._adapters = adapters

    def describe(self) -> list[Metric]:
        """Nothing: the names are known at the first scrape, and registering must not read an engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats, adapters = self._engine(), self._adapters()
        rows, distinct = self._metrics.last_step if stats.requests_running else (0, 0)
        gauges: tuple[tuple[str, str, float], ...] = (
            ("requests_running", "Requests in the batch.", stats.requests_running),
            ("requests_waiting", "Requests waiting for a place in the batch.", stats.requests_waiting),
            ("batch_rows", "Requests in the present step.", rows),
            ("batch_distinct_adapters", "Distinct adapters in the present step.", distinct),
            ("kv_cache_usage_ratio", "Share of cache blocks in use.", _ratio(stats)),
            ("adapter_slots", "Slots for composed adapters, the empty one included.", stats.slots_total),
            ("adapter_slots_used", "Slots that hold an adapter of a running request.", stats.slots_used),
            ("adapters_registered", "Adapters that have a name.", adapters.registered),
            ("adapters_resident", "Adapters in memory.", adapters.resident),
            ("adapter_resident_bytes", "Bytes of their metadata, without banks.", adapters.resident_bytes),
            ("banks", "Distinct vector banks in memory.", adapters.banks),
            ("bank_bytes", "Bytes of these banks.", adapters.bank_bytes),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(PREFIX + name, text, value)
        for name, text, value in (
            ("preemptions", "Requests put back for lack of cache.", stats.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found there.", stats.prefix_hits),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value)
        evictions = CounterMetricFamily(
            PREFIX + "adapter_evictions", "Adapters that made room for others, by what they left.", labels=["tier"]
        )
        evictions.add_metric(["resident"], adapters.evictions)
        evictions.add_metric(["slot"], stats.slot_evictions)
        yield evictions


def _ratio(stats: EngineStats) -> float:
    return stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
