"""The vocabulary of quotas and of usage: plain messages, and the Protocols through which the API asks for them.

Knows no database and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Protocol

from serving.types import HoldingsCheck, TenantLimits


class Allowance(Protocol):
    """What one request takes of its tenant's quotas. `limits` and `headers`, those that tell a client of its rates, are
    there once it was taken or refused."""

    limits: TenantLimits
    headers: dict[str, str]

    def take(self, tokens: int, param: str) -> None:
        """Count a request, and `tokens` for it. May wait: off the event loop.

        Raises `InvalidValue` with `param` for more tokens than the tenant ever may have at once, and
        `RateLimitExceeded`, having taken nothing.
        """

    def close(self, used: int | None) -> None:
        """The request has ended, having `used` so many tokens: give back the others. With None it was refused after
        all, and counts for nothing. Returns at once, and may be called more than once."""


class Quotas(Protocol):
    """What tenants may use, and what they do use."""

    def limits(self, tenant: str) -> TenantLimits:
        """What holds for `tenant`; None is no limit. May wait: off the event loop."""

    def allowance(self, tenant: str) -> Allowance:
        """For one request, nothing taken yet."""

    def adapter_quota(self, tenant: str) -> HoldingsCheck:
        """What raises `RateLimitExceeded` for more adapters, or bytes of them, than `tenant` may have now. May wait:
        off the event loop; what is returned asks nobody."""


@dataclass(frozen=True, slots=True)
class UsageCounts:
    """What was used: `cached_tokens` of the prompts' were found in the cache."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: UsageCounts) -> UsageCounts:
        return UsageCounts(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.generated_tokens + other.generated_tokens,
        )


@dataclass(frozen=True, slots=True, order=True)
class UsageKey:
    """Whose use: `adapter` is ``name@revision``, empty for the base model; `day` is of UTC."""

    day: date
    tenant: str
    adapter: str


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """Which uses to tell of; None is all. Days are inclusive."""

    tenant: str | None = None
    adapter: str | None = None
    first: date | None = None
    last: date | None = None


class UsageLedger(Protocol):
    """Who used how much."""

    def add(self, tenant: str, adapter: str, counts: UsageCounts) -> None:
        """Count something used today. Returns at once."""

    def find(
        self, wanted: UsageFilter, limit: int, after: UsageKey | None = None
    ) -> Sequence[tuple[UsageKey, UsageCounts]]:
        """By day, tenant and adapter, at most `limit` of those that follow `after`; what is not written yet included.
        Off the event loop. Raises `Unavailable` while the database does not answer."""
