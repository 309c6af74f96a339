"""An interrupted training, kept in one safetensors file: parameters, optimizer, random state and how far it came.

Knows tensors in an order, not what they mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from vblora.errors import CheckpointError
from vblora.tensorfile import write_atomically

SNAPSHOT_FILE = Path("checkpoint") / "snapshot.safetensors"


def save_snapshot(
    out: Path,
    fingerprint: Mapping[str, Any],
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    held_out_before: Any,
    losses: Sequence[float],
) -> None:
    """Write the state after `len(losses)` steps, atomically. `fingerprint` identifies the run; it and
    `held_out_before` must fit JSON."""
    tensors = {"random_state": torch.get_rng_state()}
    for index, parameter in enumerate(parameters):
        tensors[f"parameter.{index}"] = parameter.detach()
        for name, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{index}.{name}"] = value
    progress = {"run": _digest(fingerprint), "held_out_before": held_out_before, "losses": list(losses)}
    contents = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(out / SNAPSHOT_FILE, save(contents, {"format": "pt", "progress": json.dumps(progress)}))


def load_snapshot(
    out: Path, fingerprint: Mapping[str, Any], parameters: Sequence[nn.Parameter], optimizer: Optimizer
) -> tuple[Any, list[float]]:
    """Restore what `save_snapshot` wrote; returns its `held_out_before` and `losses`.

    Raises `CheckpointError` if there is no snapshot, it is damaged, or it belongs to another run.
    """
    try:
        with safe_open(out / SNAPSHOT_FILE, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            if progress["run"] != _digest(fingerprint):
                raise CheckpointError("the snapshot to resume belongs to a run with other settings or other data")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise CheckpointError(f"nothing to resume: there is no {SNAPSHOT_FILE} in the output folder") from error
    except (SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"the snapshot to resume is damaged: {error}") from error
    _restore(tensors, parameters, optimizer)
    return progress["held_out_before"], progress["losses"]


@torch.no_grad()
def _restore(tensors: Mapping[str, Tensor], parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
    for index, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"parameter.{index}"])
        prefix = f"optimizer.{index}."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        optimizer.state[parameter] = {
            name: value if value.dim() == 0 else value.to(parameter.device) for name, value in state.items()
        }
    torch.set_rng_state(tensors["random_state"])


def remove_snapshot(out: Path) -> None:
    """Forget the state of a training that has ended."""
    (out / SNAPSHOT_FILE).unlink(missing_ok=True)
    if (out / SNAPSHOT_FILE.parent).is_dir():
        (out / SNAPSHOT_FILE.parent).rmdir()


def _digest(fingerprint: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
