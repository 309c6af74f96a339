"""One training from its start, or its last snapshot, to its end. Knows no adapters: what is trained is the loop's.

What is kept between interruptions is the snapshot's; what is left at the end is the caller's to write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vblora.loop import TrainingLoop
from vblora.snapshot import load_snapshot, save_snapshot


class Report(Protocol):
    """What came out: `losses` has an entry a step; held-out losses are a number, or one a customer."""

    steps: int
    losses: list[float]
    held_out_before: Any
    held_out_after: Any


AnyReport = TypeVar("AnyReport", bound=Report)


def run_session(
    loop: TrainingLoop,
    report: AnyReport,
    out: Path,
    fingerprint: Mapping[str, Any],
    *,
    evaluate: Callable[[], Any],
    resume: bool,
    on_step: Callable[[AnyReport], None],
) -> None:
    """Train to the last step and fill in `report`, with snapshots in `out` on the way.

    `fingerprint` identifies the run: one may resume only what is the same. `on_step` is called after every step, and
    once before. Raises `CheckpointError` where there is nothing, or something else, to resume.
    """
    if resume:
        report.held_out_before, report.losses = load_snapshot(out, fingerprint, loop.parameters, loop.optimizer)
    else:
        report.held_out_before = evaluate()
    on_step(report)
    every = loop.options.save_steps
    for _ in loop.run(report.steps, report.losses):
        on_step(report)
        if every and len(report.losses) % every == 0 and len(report.losses) < report.steps:
            save_snapshot(out, fingerprint, loop.parameters, loop.optimizer, report.held_out_before, report.losses)
    report.held_out_after = evaluate()
