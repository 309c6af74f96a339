"""What the scripts share: sides measured in fresh processes that take turns, and the line of JSON at the end."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.workload import machine

Values = dict[str, float]
Measure = Callable[[argparse.Namespace, str], Values]


def arguments(description: str | None, repeats: int = 3) -> argparse.ArgumentParser:
    """A parser with what every script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=repeats, help="fresh processes a side")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser


def fresh_process(module: str, *given: object) -> dict[str, Any]:
    """The JSON of the last line that a benchmark prints, run in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, given)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main(
    claim: str,
    module: str,
    parser: argparse.ArgumentParser,
    measure: Measure,
    ratio: tuple[str, str],
    sides: Sequence[str] = ("all",),
) -> None:
    """Run `measure(options, side)` for each side in turn, `--repeats` times, each in a process of its own, and print
    the medians' ratio. A process returns values by name: its side's, or several that are to be measured together."""
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options, options.side)))
        return
    found: dict[str, list[float]] = {}
    for repeat in range(options.repeats):
        for side in sides:
            values = fresh_process(module, *sys.argv[1:], "--side", side)
            for name, value in values.items():
                found.setdefault(name, []).append(value)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"{repeat + 1}/{options.repeats} {shown}", flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    above, below = ratio
    print(json.dumps({"claim": claim, "ratio": medians[above] / medians[below], "sides": found, **machine()}))
