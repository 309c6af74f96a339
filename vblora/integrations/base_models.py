"""Base models by name: a hub id, a folder, a `.gguf` file or ``demo``, loaded through `transformers`.

It does not know adapters, nor whether the model will be trained on or served.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vblora.integrations import BaseModelError
from vblora.integrations.gguf_cache import converted, demo_source, file_source

__all__ = [
    "DEMO", "BaseModel", "BaseModelError", "cpu_computes", "load_base_model", "model_on_meta", "resolve_dtype",
    "save_base_model",
]  # fmt: skip

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class BaseModel:
    """A causal language model in evaluation mode, its tokenizer, and the id that clients know it by."""

    base_id: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Source:
    """Where `transformers` reads a model: a folder, or a hub id."""

    base_id: str
    location: str
    chat_template: str | None = None


def load_base_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    chat_template: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> BaseModel:
    """Load `name`: a folder, a `.gguf` file, ``demo``, or else a hub id; safetensors only, never remote code.

    GGUF weights (and the demo's) are converted once to bfloat16 in the user's cache. `dtype` is that of the weights,
    ``auto`` as in `resolve_dtype`; `chat_template` is the path of a Jinja file that replaces the model's own;
    `progress` is told in words about steps that take long. Raises `BaseModelError`.
    """
    source = _find(name, progress or (lambda message: None))
    place = _device(device)
    try:
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=False)
        model = _load_model(source.location, resolve_dtype(dtype, config, place), place)
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise BaseModelError(f"cannot load the base model {name!r}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"the tokenizer of {name!r} has no end-of-text token")
    if template := _read_template(chat_template) or source.chat_template:
        tokenizer.chat_template = template
        _try_template(tokenizer)
    return BaseModel(source.base_id, model, tokenizer)


def model_on_meta(name: str, task_type: str, *, progress: Callable[[str], None] | None = None) -> PreTrainedModel:
    """The modules of a base model without weights, of the class that PEFT's `task_type` means.

    Raises `BaseModelError` for an unknown task type, and as `load_base_model` does.
    """
    classes = {
        "CAUSAL_LM": AutoModelForCausalLM,
        "SEQ_CLS": AutoModelForSequenceClassification,
        "TOKEN_CLS": AutoModelForTokenClassification,
        "QUESTION_ANS": AutoModelForQuestionAnswering,
    }
    if task_type not in classes:
        raise BaseModelError(f"task_type must be one of {', '.join(classes)}, not {task_type!r}")
    source = _find(name, progress or (lambda message: None))
    try:
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = classes[task_type].from_config(config, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise BaseModelError(f"cannot read the base model {name!r}: {_first_line(error)}") from error
    return model


def save_base_model(base: BaseModel, directory: Path) -> None:
    """Write a model and its tokenizer as a folder that `load_base_model` and transformers read.

    Raises `BaseModelError` if the folder holds anything already: nothing is overwritten.
    """
    if directory.exists() and any(directory.iterdir()):
        raise BaseModelError(f"{directory} is not empty: a model is written into a new folder")
    base.model.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)


def resolve_dtype(requested: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype of the weights. ``auto`` is the checkpoint's own on CUDA, and on a CPU that computes in bfloat16 if
    that is the checkpoint's; otherwise float32. Raises `BaseModelError` for an unknown name."""
    if requested in DTYPES:
        return DTYPES[requested]
    if requested != "auto":
        raise BaseModelError(f"dtype must be one of auto, {', '.join(DTYPES)}; got {requested!r}")
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if device.type == "cuda" or (own is torch.bfloat16 and cpu_computes(own)):
        return own
    return torch.float32


def cpu_computes(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for a dtype, without which it would be many times slower."""
    wanted = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}.get(dtype)
    capabilities = torch.cpu.get_capabilities()
    return wanted is None or any(capabilities.get(name) is True for name in wanted)


def _find(name: str, progress: Callable[[str], None]) -> _Source:
    path = Path(name)
    if name == DEMO:
        template = files("vblora.integrations").joinpath("demo_chat_template.jinja").read_text()
        source = demo_source()
        return _Source(source.stem, str(converted(source, progress)), template)
    if path.suffix == ".gguf":
        return _Source(path.stem, str(converted(file_source(path), progress)))
    if path.is_dir():
        return _Source(path.resolve().name, name)
    if _HUB_ID.fullmatch(name):
        return _Source(name, name)
    raise BaseModelError(f"no base model {name!r}: no such folder, and not a hub id, a .gguf file or {DEMO!r}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BaseModelError(f"unknown device {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(f"device {name!r} is not available: this torch sees no CUDA device")
    return device


def _load_model(location: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Weights that the checkpoint lacks are an error: `transformers` would make them up with only a warning."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        location, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ValueError(f"its checkpoint lacks {len(missing)} weights, {missing[0]} among them")
    model: PreTrainedModel = loaded[0].to(device).eval()
    return model


def _read_template(path: str | Path | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BaseModelError(f"cannot read the chat template {path}: {error}") from error


def _try_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template that cannot render one user turn fails at start, not at the first request."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "text"}], tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise BaseModelError(f"the chat template cannot be used: {error}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
