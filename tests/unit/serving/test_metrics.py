from __future__ import annotations

import time

from prometheus_client import CollectorRegistry

from serving.metrics import AdapterGauges, Metrics
from serving.types import EngineStats, StepReport
from serving.vllm_metrics import LORA_LABELS


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"vblora_{name}", labels)


def test_the_engines_reports_are_counted() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.on_admitted(0.5)
    metrics.on_first_token(1)
    metrics.on_next_token(0.1)
    metrics.on_next_token(0.1)
    metrics.on_compose(0.001)
    metrics.on_step(StepReport(0.02, 3, 0, 0, 50, 2))
    metrics.on_finished("acme", "stop", 2.0, 5, 3, 7)
    metrics.on_finished("acme", "length", 2.0, 1, 0, 1)
    assert value(metrics, "request_queue_time_seconds_sum") == 0.5
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_count") == 2
    assert value(metrics, "adapter_compose_seconds_sum") == 0.001
    assert value(metrics, "step_duration_seconds_sum", phase="decode") == 0.02
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    assert value(metrics, "e2e_request_latency_seconds_sum") == 4.0
    assert value(metrics, "prompt_tokens_total") == 6
    assert value(metrics, "cached_prompt_tokens_total") == 3
    assert value(metrics, "generation_tokens_total") == 8


def test_the_routes_reports_are_counted() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.on_error("invalid_value")
    metrics.on_error("overloaded")
    metrics.on_adapter_loaded("upload", 0.3)
    assert value(metrics, "request_errors_total", code="invalid_value") == 1
    assert value(metrics, "admission_rejections_total", reason="overloaded") == 1
    assert value(metrics, "admission_rejections_total", reason="invalid_value") is None
    assert value(metrics, "adapter_load_seconds_sum", source="upload") == 0.3


def test_gauges_are_read_at_each_scrape_and_rest_when_nothing_runs() -> None:
    stats = EngineStats(1, 2, 3, 4, 5, 6, 7, 15, 16, slot_evictions=17)
    metrics = Metrics(CollectorRegistry())
    metrics.watch(lambda: stats, lambda: AdapterGauges(8, 9, 10, 11, 12, evictions=18))
    metrics.on_step(StepReport(0.1, 10, 3, 60, 500, 14))
    expected = {
        "requests_running": 1,
        "requests_waiting": 2,
        "kv_cache_usage_ratio": 0.75,
        "adapter_slots_used": 5,
        "adapter_slots": 6,
        "preemptions_total": 7,
        "prefix_cache_queries_total": 15,
        "prefix_cache_hits_total": 16,
        "adapters_registered": 8,
        "adapters_resident": 9,
        "adapter_resident_bytes": 10,
        "banks": 11,
        "bank_bytes": 12,
        "batch_rows": 13,
        "batch_distinct_adapters": 14,
    }
    assert {name: value(metrics, name) for name in expected} == expected
    assert value(metrics, "adapter_evictions_total", tier="slot") == 17
    assert value(metrics, "adapter_evictions_total", tier="resident") == 18
    stats.requests_running = stats.kv_blocks_total = 0
    at_rest = ("requests_running", "batch_rows", "batch_distinct_adapters", "kv_cache_usage_ratio")
    assert {value(metrics, name) for name in at_rest} == {0}


def test_two_servers_in_a_process_do_not_meet() -> None:
    first, second = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    first.on_error("overloaded")
    assert value(second, "request_errors_total", code="overloaded") is None


def test_vllms_gauges_come_where_they_are_wanted_with_one_series_for_adapters() -> None:
    running, waiting = frozenset({"b" * 64, "a" * 64}), frozenset({"c" * 64})
    stats = EngineStats(1, 2, 3, 4, 5, 6, running_revisions=running, waiting_revisions=waiting)
    metrics, plain = Metrics(CollectorRegistry(), vllm=True), Metrics(CollectorRegistry())
    for each in (metrics, plain):
        each.watch(lambda: stats, lambda: AdapterGauges(8, 9, 10, 11, 12, 13))
    sample = metrics.registry.get_sample_value
    assert (sample("vllm:num_requests_running"), sample("vllm:num_requests_waiting")) == (1, 2)
    assert sample("vllm:kv_cache_usage_perc") == 0.75
    labels = dict(zip(LORA_LABELS, ("5", f"{'a' * 16},{'b' * 16}", "c" * 16), strict=True))
    assert abs((sample("vllm:lora_requests_info", labels) or 0) - time.time()) < 5
    stats.running_revisions = stats.waiting_revisions = frozenset()
    series = [family.samples for family in metrics.registry.collect() if family.name == "vllm:lora_requests_info"]
    assert [len(samples) for samples in series] == [1], "what ran before has no series of its own"
    assert series[0][0].labels == dict(zip(LORA_LABELS, ("5", "", ""), strict=True))
    assert not [family.name for family in plain.registry.collect() if family.name.startswith("vllm")]
