"""Who has been served how much, and how a step's room is shared. Knows tenants and weights, no requests."""

from __future__ import annotations

from collections.abc import Collection, Mapping

REMEMBERED = 1024  # counters before those that say nothing are dropped


class ServiceCounters:
    """The virtual token counters of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), weighted.

    A counter is service over weight; the tenant with the lowest is served next. Idleness earns no credit: who comes
    back starts level with the least served of those that wait, or with the last that waited. While two tenants wait
    without a break their counters differ by at most U = max(w_p·L, w_q·M) / w: w_p and w_q are the costs of a prompt's
    and of a generated token, L the longest prompt, M the most tokens that the rows of one batch come to hold, w the
    lighter of the two weights. So the service over weight that the two get in any interval differs by at most 2U.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last: str | None = None
        self._floor = 0.0

    def __getitem__(self, tenant: str) -> float:
        return self._served[tenant]

    def __len__(self) -> int:
        return len(self._served)

    def weigh(self, tenant: str, weight: float) -> None:
        """What `tenant` gets from now on counts by this weight."""
        self._weights[tenant] = weight

    def join(self, tenant: str, waiting: Collection[str], running: Collection[str]) -> None:
        """`tenant`, which has been weighed, begins to wait; the others that do are `waiting`."""
        last = self._served.get(self._last or "", self._floor)
        self._floor = max(self._floor, min((self._served[other] for other in waiting), default=last))
        self._served[tenant] = max(self._served.get(tenant, 0.0), self._floor)
        if len(self._served) > REMEMBERED + len(waiting) + len(running):
            self._drop_idle({tenant, *waiting, *running})

    def leave(self, tenant: str) -> None:
        """No request of `tenant` waits any more."""
        self._last = tenant

    def charge(self, tenant: str, service: float) -> None:
        """`tenant` has got so much."""
        self._served[tenant] += service / self._weights[tenant]

    def shares(self, total: int, demands: Mapping[str, int]) -> dict[str, int]:
        """`total` divided by weight, nobody getting more than its demand; what one leaves is for the others. Of tokens
        that cannot be divided, the first in `demands` get one each."""
        shares = dict.fromkeys(demands, 0)
        left = min(total, sum(demands.values()))
        while left:
            open_ = [tenant for tenant in demands if shares[tenant] < demands[tenant]]
            weight = sum(self._weights[tenant] for tenant in open_)
            parts = {tenant: int(left * self._weights[tenant] / weight) for tenant in open_}
            if not any(parts.values()):
                parts = dict.fromkeys(open_[:left], 1)
            for tenant, part in parts.items():
                given = min(part, demands[tenant] - shares[tenant])
                shares[tenant] += given
                left -= given
        return shares

    def parts(self, total: int, among: Collection[str]) -> dict[str, float]:
        """`total` divided by weight; nobody's part is less than one."""
        each = total / sum(self._weights[tenant] for tenant in among) if among else 0.0
        return {tenant: max(1.0, each * self._weights[tenant]) for tenant in among}

    def _drop_idle(self, busy: Collection[str]) -> None:
        """Whoever comes back from below the floor starts at the floor, remembered or not."""
        for tenant in [tenant for tenant in self._served if tenant not in busy and tenant != self._last]:
            if self._served[tenant] <= self._floor:
                del self._served[tenant], self._weights[tenant]
