"""What a training leaves beside its adapter: what it was told, and every loss, as JSON, as CSV and as a picture.

Knows numbers and file names, not models.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vblora.config import VBLoRAConfig
from vblora.tensorfile import write_atomically

REPORT_FILE = "training.json"
LOSSES_FILE = "losses.csv"
PLOT_FILE = "losses.png"


def write_record(
    out: Path,
    config: VBLoRAConfig,
    options: Mapping[str, Any],
    report: Mapping[str, Any],
    losses: Mapping[str, Sequence[float]],
) -> None:
    """Write `training.json`, `losses.csv` (a row a step, a column for each of `losses`) and, where matplotlib is
    installed, `losses.png`."""
    values = {"config": config.to_dict(), "options": options, "report": report}
    write_atomically(out / REPORT_FILE, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", *losses])
    table.writerows([step, *row] for step, row in enumerate(zip_longest(*losses.values()), 1))
    write_atomically(out / LOSSES_FILE, text.getvalue().encode())
    if picture := _plot(losses):
        write_atomically(out / PLOT_FILE, picture)


def can_plot() -> bool:
    """Whether matplotlib is installed: it comes with the extra `train`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _plot(losses: Mapping[str, Sequence[float]]) -> bytes | None:
    """A PNG of the losses over the steps; None without matplotlib."""
    if not can_plot():
        return None
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="training loss, nats a token")
    for name, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, label=name, linewidth=1)
    if len(losses) > 1:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()
