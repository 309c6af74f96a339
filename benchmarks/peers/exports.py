"""Workload W as files that other engines read: the base model in bfloat16, and adapters as exact LoRA exports."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.workload import PROMPT, random_content
from vblora.checkpoint import write_adapter
from vblora.compact import SlotLayout
from vblora.export import export_lora
from vblora.integrations.base_models import load_base_model, save_base_model


@dataclass(frozen=True)
class Exports:
    """A folder with the base model, the prompt's token ids, and a folder for each adapter's LoRA."""

    model: Path
    prompt: tuple[int, ...]
    loras: tuple[Path, ...]

    def save(self, folder: Path) -> None:
        """Write down, as JSON, what is where."""
        (folder / "exports.json").write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, folder: Path) -> Exports:
        """What `save` wrote down."""
        found = json.loads((folder / "exports.json").read_text())
        return cls(Path(found["model"]), tuple(found["prompt"]), tuple(map(Path, found["loras"])))


def write_exports(model: str, folder: Path, adapters: int) -> Exports:
    """Write the base model and the LoRAs of the adapters with seeds 0 to `adapters` - 1 into an empty folder."""
    base = load_base_model(model, dtype="bfloat16")
    shapes = SlotLayout.from_model(base.model).modules
    save_base_model(base, folder / "model")
    loras = tuple(folder / f"lora{seed}" for seed in range(adapters))
    for seed, lora in enumerate(loras):
        with tempfile.TemporaryDirectory() as own:
            write_adapter(Path(own), random_content(shapes, seed))
            export_lora(own, lora)
    return Exports(folder / "model", tuple(base.tokenizer(PROMPT).input_ids), loras)
