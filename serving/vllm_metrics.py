"""vLLM's gauges, by vLLM's names, for inference gateways and dashboards that look for them (`--metrics-compat vllm`).

Knows neither adapters' names nor the server's own metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.types import EngineStats

PREFIX = "vllm:"
REVISION_DIGITS = 16
LORA_LABELS = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")


class VllmGauges(Collector):
    """The gauges of one scrape. `lora_requests_info` has always one series: its labels say which adapters run and
    which wait, as revisions, the first digits of their contents' hashes; its value is the time, as vLLM has it."""

    def __init__(self, engine: Callable[[], EngineStats]) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Nothing: the names are known at the first scrape, and registering must not read an engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._engine()
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests in the batch.", stats.requests_running),
            ("num_requests_waiting", "Requests waiting for a place in the batch.", stats.requests_waiting),
            ("kv_cache_usage_perc", "Share of cache blocks in use; 1 is all.", usage),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value)
        info = GaugeMetricFamily(PREFIX + "lora_requests_info", "Adapters of requests, and when.", labels=LORA_LABELS)
        most = max(0, stats.slots_total - 1)  # one holds no adapter
        info.add_metric(
            [str(most), _revisions(stats.running_revisions), _revisions(stats.waiting_revisions)], time.time()
        )
        yield info


def _revisions(content_hashes: Iterable[str]) -> str:
    return ",".join(sorted(content_hash[:REVISION_DIGITS] for content_hash in content_hashes))
