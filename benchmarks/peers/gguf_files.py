"""GGUF files, the form that llama.cpp reads: base models as they came, LoRA exports written anew."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
from safetensors.torch import load_file

from vblora.checkpoint import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from vblora.integrations.base_models import DEMO
from vblora.integrations.gguf_cache import demo_source

_PARTS = {"lora_A": "lora_a", "lora_B": "lora_b"}


def write_lora(source: Path, target: Path, architecture: gguf.MODEL_ARCH, layers: int) -> None:
    """Write the PEFT LoRA in the folder `source` as one GGUF file, in float32, for a model of so many layers."""
    names = gguf.get_tensor_name_map(architecture, layers)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, json.loads((source / CONFIG_FILE).read_text())["lora_alpha"])
    for path, tensor in load_file(source / WEIGHTS_FILE).items():
        module, part, _ = path.removeprefix(PREFIX).rsplit(".", 2)
        writer.add_tensor(f"{names.get_name(module)}.weight.{_PARTS[part]}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def join_parts(model: str, target: Path) -> Path:
    """The GGUF file that a base model by this name (``demo``, or a `.gguf` file) is made from, as one file."""
    if model != DEMO and not model.endswith(".gguf"):
        raise SystemExit(f"llama.cpp needs a model that comes from a GGUF file: {DEMO}, or a .gguf file; not {model}")
    with target.open("wb") as out:
        for part in demo_source().parts if model == DEMO else [Path(model)]:
            out.write(part.read_bytes())
    return target
