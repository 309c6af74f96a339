"""What each tenant may use: requests and tokens a minute, requests at a time, adapters and their bytes.

Knows no routes and no engine. Rates are kept in `windows.py`; what is at work at a time is counted here, for this
process.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from threading import Lock
from typing import Any

from serving.errors import InvalidValue, RateLimitExceeded
from serving.tenancy.windows import Charge, Windows
from serving.types import HoldingsCheck, TenantDirectory, TenantLimits

FULL_SECONDS = 60  # before an upload over a quota may be tried again: something has to be deleted first
BUSY_SECONDS = 1


class TenantQuotas:
    """`serving.tenancy.metering.Quotas` over a directory. Thread-safe."""

    def __init__(self, directory: TenantDirectory, defaults: TenantLimits, windows: Windows) -> None:
        """`defaults` are for what the directory says nothing of; there as here 0 is no limit."""
        self._directory = directory
        self._defaults = defaults
        self._windows = windows
        self._lock = Lock()
        self._at_work: Counter[str] = Counter()

    def limits(self, tenant: str) -> TenantLimits:
        """What holds for `tenant`; None is no limit."""
        own = self._directory.limits(tenant)
        names = [entry.name for entry in fields(TenantLimits) if entry.name != "weight"]
        merged: dict[str, Any] = {}
        for name in names:
            value = getattr(own, name)
            merged[name] = (getattr(self._defaults, name) if value is None else value) or None
        return replace(own, **merged)

    def allowance(self, tenant: str) -> TenantAllowance:
        """What one request will use; nothing yet."""
        return TenantAllowance(self, tenant, self._windows)

    def adapter_quota(self, tenant: str) -> HoldingsCheck:
        """What raises `RateLimitExceeded` for more adapters, or bytes of them, than `tenant` may have now."""
        return partial(_check_holdings, self.limits(tenant))

    def enter(self, tenant: str, limit: int | None) -> bool:
        """Count one more request at work, if no more than `limit` are."""
        with self._lock:
            if limit is not None and self._at_work[tenant] >= limit:
                return False
            self._at_work[tenant] += 1
            return True

    def leave(self, tenant: str) -> None:
        """Count one less."""
        with self._lock:
            self._at_work[tenant] -= 1
            if not self._at_work[tenant]:
                del self._at_work[tenant]

    def at_work(self, tenant: str) -> int:
        """Requests that entered and have not left."""
        with self._lock:
            return self._at_work[tenant]


class TenantAllowance:
    """`serving.tenancy.metering.Allowance`. Tokens are reserved in full when it is taken: the prompt's, cached ones
    too, and as many as may be generated. What was not used is given back when it is closed, into the minute that is
    then."""

    def __init__(self, quotas: TenantQuotas, tenant: str, windows: Windows) -> None:
        self.limits = TenantLimits()
        self.headers: dict[str, str] = {}
        self._quotas = quotas
        self._tenant = tenant
        self._windows = windows
        self._entered = False
        self._charges: dict[str, Charge] = {}

    def take(self, tokens: int, param: str) -> None:
        limits = self.limits = self._quotas.limits(self._tenant)
        if limits.tokens_per_minute is not None and tokens > limits.tokens_per_minute:
            raise InvalidValue(
                f"prompt and {param} come to {tokens} tokens, above your quota of {limits.tokens_per_minute} a minute",
                param=param,
            )
        costs = {"requests": (limits.requests_per_minute, 1), "tokens": (limits.tokens_per_minute, tokens)}
        try:
            self._enter(limits.concurrent_requests)
            for kind, (limit, cost) in costs.items():
                if limit is not None:
                    self._charge(kind, limit, cost)
        except RateLimitExceeded:
            self.close(None)
            raise
        finally:
            for kind, (limit, _) in costs.items():
                if limit is not None:
                    self._tell(kind, limit)

    def close(self, used: int | None) -> None:
        if self._entered:
            self._entered = False
            self._quotas.leave(self._tenant)
        for kind, charge in self._charges.items():
            spent = 0 if used is None else used if kind == "tokens" else 1
            if charge.cost > spent:
                self._windows.give_back(charge, charge.cost - spent)
        self._charges.clear()

    def _enter(self, limit: int | None) -> None:
        self._entered = self._quotas.enter(self._tenant, limit)
        if not self._entered:
            raise _refusal(f"your quota is {limit} requests at a time", "concurrent_requests", BUSY_SECONDS)

    def _charge(self, kind: str, limit: int, cost: int) -> None:
        charge = self._windows.take(self._window(kind), limit, cost)
        if charge is None:
            seconds = self._windows.read(self._window(kind)).until(limit, cost)
            raise _refusal(f"your quota is {limit} {kind} a minute", f"{kind}_per_minute", math.ceil(seconds))
        self._charges[kind] = charge

    def _tell(self, kind: str, limit: int) -> None:
        window = self._windows.read(self._window(kind))
        self.headers |= {
            f"x-ratelimit-limit-{kind}": str(limit),
            f"x-ratelimit-remaining-{kind}": str(max(0, limit - window.taken)),
            f"x-ratelimit-reset-{kind}": duration(window.until_empty),
        }

    def _window(self, kind: str) -> str:
        return f"{kind}/{self._tenant}"


def _check_holdings(limits: TenantLimits, count: int, size: int) -> None:
    if limits.adapters is not None and count > limits.adapters:
        raise _refusal(f"your quota is {limits.adapters} adapters: delete one first", "adapters", FULL_SECONDS)
    if limits.adapter_bytes is not None and size > limits.adapter_bytes:
        raise _refusal(
            f"your adapters would take {size} bytes, your quota is {limits.adapter_bytes}: delete some first",
            "adapter_bytes",
            FULL_SECONDS,
        )


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``0s``, ``350ms``, ``8.6s``, ``1m30s``."""
    if 0 < seconds < 1:
        return f"{max(1, round(seconds * 1000))}ms"
    minutes, rest = divmod(round(seconds, 1), 60)
    return (f"{minutes:.0f}m" if minutes else "") + f"{rest:g}s"


def _refusal(message: str, reason: str, seconds: int) -> RateLimitExceeded:
    return RateLimitExceeded(message, reason=reason, retry_after=max(1, seconds))
