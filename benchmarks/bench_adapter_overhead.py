"""P4: throughput of 32 requests on 32 distinct adapters against the same requests on the base alone, own engine."""

from __future__ import annotations

from benchmarks.contest import Contest, contest_arguments, own_side

ADAPTERS = {"adapters": 32, "base": 0}


def main() -> None:
    sides = {name: own_side(count) for name, count in ADAPTERS.items()}
    Contest("P4", "benchmarks.bench_adapter_overhead", sides, ADAPTERS).main(contest_arguments(__doc__))


if __name__ == "__main__":
    main()
