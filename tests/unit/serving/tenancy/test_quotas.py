"""What tenants may use, request by request, over real windows in memory."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from serving.errors import InvalidValue, RateLimitExceeded
from serving.tenancy.quotas import TenantQuotas, duration
from serving.tenancy.windows import Windows
from serving.types import TenantLimits


@dataclass
class Directory:
    """Some tenants with limits of their own."""

    known: dict[str, TenantLimits] = field(default_factory=dict)

    def limits(self, tenant: str) -> TenantLimits:
        return self.known.get(tenant, TenantLimits())


def quotas(directory: Directory | None = None, **defaults: Any) -> TenantQuotas:
    return TenantQuotas(directory or Directory(), TenantLimits(**defaults), Windows())


def refused(subject: TenantQuotas, tokens: int = 1, tenant: str = "a") -> RateLimitExceeded:
    allowance = subject.allowance(tenant)
    with pytest.raises(RateLimitExceeded) as caught:
        allowance.take(tokens, "max_tokens")
    assert caught.value.retry_after and caught.value.retry_after >= 1
    return caught.value


def test_a_tenants_own_limits_go_before_the_servers_and_zero_is_none() -> None:
    own = TenantLimits(requests_per_minute=5, tokens_per_minute=0, weight=2.5)
    subject = quotas(Directory({"a": own}), requests_per_minute=9, tokens_per_minute=9, max_tokens=7, adapters=0)
    assert subject.limits("a") == TenantLimits(requests_per_minute=5, max_tokens=7, weight=2.5)
    assert subject.limits("b") == TenantLimits(requests_per_minute=9, tokens_per_minute=9, max_tokens=7)


def test_without_quotas_nothing_is_counted_or_told() -> None:
    subject = quotas()
    for _ in range(50):
        allowance = subject.allowance("a")
        allowance.take(10**6, "max_tokens")
        assert allowance.headers == {}


def test_requests_a_minute() -> None:
    subject = quotas(requests_per_minute=2)
    for remaining in (1, 0):
        allowance = subject.allowance("a")
        allowance.take(10, "max_tokens")
        assert allowance.headers["x-ratelimit-limit-requests"] == "2"
        assert allowance.headers["x-ratelimit-remaining-requests"] == str(remaining)
        assert set(allowance.headers) == {f"x-ratelimit-{w}-requests" for w in ("limit", "remaining", "reset")}
        allowance.close(10)
    error = refused(subject)
    assert (error.reason, error.code) == ("requests_per_minute", "rate_limit_exceeded")
    subject.allowance("b").take(1, "max_tokens")


def test_a_refusal_tells_of_the_rates_too() -> None:
    subject = quotas(requests_per_minute=1, tokens_per_minute=100)
    subject.allowance("a").take(60, "max_tokens")
    late = subject.allowance("a")
    with pytest.raises(RateLimitExceeded):
        late.take(10, "max_tokens")
    told = {name: late.headers[name] for name in late.headers if "reset" not in name}
    assert told == {
        "x-ratelimit-limit-requests": "1",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "40",
    }
    assert all(late.headers[f"x-ratelimit-reset-{kind}"].endswith("s") for kind in ("requests", "tokens"))


def test_tokens_are_reserved_and_what_was_not_used_is_given_back() -> None:
    subject = quotas(tokens_per_minute=100)
    first = subject.allowance("a")
    first.take(70, "max_tokens")
    assert refused(subject, 40).reason == "tokens_per_minute"
    first.close(20)
    first.close(20)
    second = subject.allowance("a")
    second.take(80, "max_tokens")
    assert second.headers["x-ratelimit-remaining-tokens"] == "0"
    assert refused(subject, 1).reason == "tokens_per_minute"


def test_a_refused_request_consumes_nothing() -> None:
    subject = quotas(requests_per_minute=3, tokens_per_minute=100, concurrent_requests=2)
    held = subject.allowance("a")
    held.take(90, "max_tokens")
    for _ in range(5):
        assert refused(subject, 50).reason == "tokens_per_minute"
    assert subject.at_work("a") == 1
    last = subject.allowance("a")
    last.take(10, "max_tokens")
    assert last.headers["x-ratelimit-remaining-requests"] == "1", "the five took none"
    assert refused(subject).reason == "concurrent_requests"


def test_one_that_is_refused_later_counts_for_nothing() -> None:
    subject = quotas(requests_per_minute=1, tokens_per_minute=50, concurrent_requests=1)
    for _ in range(3):
        allowance = subject.allowance("a")
        allowance.take(50, "max_tokens")
        allowance.close(None)
    assert subject.at_work("a") == 0


def test_more_than_the_quota_at_once_can_never_succeed_and_is_the_clients_fault() -> None:
    subject = quotas(tokens_per_minute=100, concurrent_requests=1)
    with pytest.raises(InvalidValue, match="101 tokens") as caught:
        subject.allowance("a").take(101, "max_output_tokens")
    assert caught.value.param == "max_output_tokens"
    assert subject.at_work("a") == 0
    subject.allowance("a").take(100, "max_tokens")


def test_requests_at_a_time_never_leak_whatever_the_threads_do() -> None:
    subject = quotas(concurrent_requests=3)
    barrier = threading.Barrier(8)
    most = 0

    def ask(_: int) -> int:
        nonlocal most
        taken = 0
        barrier.wait()
        for _ in range(200):
            allowance = subject.allowance("a")
            try:
                allowance.take(1, "max_tokens")
                most = max(most, subject.at_work("a"))
                taken += 1
            except RateLimitExceeded:
                pass
            finally:
                allowance.close(1)
                allowance.close(None)
        return taken

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) > 0
    assert (subject.at_work("a"), most <= 3) == (0, True)


def test_adapters_and_their_bytes() -> None:
    subject = quotas(Directory({"large": TenantLimits(adapters=100)}), adapters=2, adapter_bytes=1000)
    subject.adapter_quota("a")(2, 1000)
    for count, size, reason in ((3, 10, "adapters"), (1, 1001, "adapter_bytes")):
        with pytest.raises(RateLimitExceeded) as caught:
            subject.adapter_quota("a")(count, size)
        assert caught.value.reason == reason
    subject.adapter_quota("large")(100, 1000)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.35, "350ms"), (1, "1s"), (8.64, "8.6s"), (59.99, "1m0s"), (90, "1m30s")],
)
def test_durations_read_as_openais(seconds: float, text: str) -> None:
    assert duration(seconds) == text
