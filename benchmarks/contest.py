"""Two sides that answer the same kind of requests, in fresh processes that take turns; texts are scored before speed.

Row i of a side has the adapter with seed i modulo the side's number of adapters, or none. A side may also return
what it ran with. A side whose texts are incomplete or too unlikely ends the script: see `scoring`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scoring import TOLERANCE
from benchmarks.sides import arguments, fresh_process
from benchmarks.workload import machine, random_adapter, started_engine, timed_answers
from serving.types import EngineSettings

Scores = dict[str, dict[str, float]]

PREPARE = "prepare"


@dataclass(frozen=True)
class Run:
    """What one process of a side did: seconds of whole requests, the prompt, and the tokens of every answer."""

    seconds: float
    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return sum(map(len, self.answers)) / self.seconds


Side = Callable[[argparse.Namespace], Run]


def own_side(adapters: int) -> Side:
    """This project's engine: `--rows` requests of `--tokens` tokens on so many distinct adapters."""

    def run(options: argparse.Namespace) -> Run:
        engine = started_engine(EngineSettings(model=options.model, dtype=options.dtype))
        revisions = [engine.load_adapter(random_adapter(engine, seed)) for seed in range(adapters)]
        seconds, prompt, answers = timed_answers(engine, options.tokens, revisions, options.rows)
        engine.close()
        return Run(seconds, prompt, answers)

    return run


@dataclass(frozen=True)
class Contest:
    """A claim: the first side's rate over the second's. `adapters` counts each side's distinct adapters; `prepare`,
    run once in a process of its own, writes into the folder that the sides find as `options.folder`."""

    claim: str
    module: str
    sides: Mapping[str, Side]
    adapters: Mapping[str, int]
    prepare: Callable[[argparse.Namespace], None] | None = None

    def main(self, parser: argparse.ArgumentParser) -> None:
        """Run the script, or the one side or the preparation that its own process was started for."""
        options = parser.parse_args()
        if options.side == PREPARE and self.prepare is not None:
            self.prepare(options)
            print("{}")
        elif options.side:
            print(json.dumps(asdict(self.sides[options.side](options))))
        else:
            with tempfile.TemporaryDirectory() as folder:
                self._compare(options, Path(folder))

    def _compare(self, options: argparse.Namespace, folder: Path) -> None:
        if self.prepare is not None:
            self._process(PREPARE, folder)
        rates: dict[str, list[float]] = {side: [] for side in self.sides}
        scores: Scores = {}
        first: dict[str, Run] = {}
        for repeat in range(options.repeats):
            for side in self.sides:
                run = Run(**self._process(side, folder))
                self._check_lengths(side, run, options.tokens)
                first.setdefault(side, run)
                rates[side].append(run.rate)
                print(f"{repeat + 1}/{options.repeats} {side} {run.rate:.4g} tokens a second", flush=True)
            scores = scores or self._scores(options, first, folder)
        above, below = (statistics.median(rates[side]) for side in self.sides)
        about = {side: run.about for side, run in first.items() if run.about}
        found = {"claim": self.claim, "ratio": above / below, "sides": rates, "scores": scores, "about": about}
        print(json.dumps(found | machine()))

    def _process(self, side: str, folder: Path) -> dict[str, Any]:
        return fresh_process(self.module, *sys.argv[1:], "--side", side, "--folder", folder)

    def _check_lengths(self, side: str, run: Run, tokens: int) -> None:
        if not run.answers or any(len(answer) != tokens for answer in run.answers):
            raise SystemExit(f"{self.claim}: {side} did not generate {tokens} tokens for every request")

    def _scores(
        self, options: argparse.Namespace, runs: Mapping[str, Run], folder: Path
    ) -> dict[str, dict[str, float]]:
        """What `scoring` finds of each side; ends the script if one is too unlikely."""
        prompt = next(iter(runs.values())).prompt
        rows = {
            side: [
                (row % distinct if (distinct := self.adapters[side]) else None, text)
                for row, text in enumerate(run.answers)
            ]
            for side, run in runs.items()
        }
        job = {"model": options.model, "prompt": prompt, "sides": rows}
        file = folder / "scoring.json"
        file.write_text(json.dumps(job))
        scores: Scores = fresh_process("benchmarks.scoring", file)
        for side, score in scores.items():
            if score["regret"] > TOLERANCE:
                raise SystemExit(
                    f"{self.claim}: under the float32 reference the texts of {side} lose {score['regret']:.4f} nats a "
                    f"token to its greedy choices, more than {TOLERANCE}: no speed is reported"
                )
        return scores


def contest_arguments(description: str | None, rows: int = 32) -> argparse.ArgumentParser:
    """What every contest takes."""
    parser = arguments(description)
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser
