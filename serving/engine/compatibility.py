"""Whether the engine can run a base model rightly, found out before it serves anything. Knows no requests.

transformers only warns when an attention implementation has no effect, and such a model would let packed requests
see each other. So a model is served if its configuration holds nothing the engine lacks, its attention reads back as
ours, and one packed forward equals separate forwards through transformers' own attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from serving.engine.attention import ATTRIBUTE, IMPLEMENTATION, AttentionOptions, register
from serving.errors import StartupError
from vblora.compact import linear_shape

LAYER_TYPES = {"full_attention", "sliding_attention"}
MOVING_ROPE = "dynamic"
TWO_ROPES = "longrope"
PROBE_LENGTHS = (7, 12)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.4, torch.float16: 0.1}  # the most that `deviation` may be


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the decoder."""
    return model.config.get_text_config(decoder=True)


def check_configuration(model: PreTrainedModel) -> None:
    """Raise `StartupError` for what the configuration shows cannot run."""
    config = text_config(model)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise StartupError(f"{name} is an encoder-decoder model: this server runs decoder-only models")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if odd:
        raise StartupError(f"{name} has layers of type {', '.join(odd)}: only full and sliding attention can be served")
    if getattr(config, "num_kv_shared_layers", 0):
        raise StartupError(f"{name} shares keys and values between layers, which the paged cache cannot hold")
    if MOVING_ROPE in _rope_types(config):
        raise StartupError(_moving(name, MOVING_ROPE))


def _rope_types(config: Any) -> Iterator[str]:
    """The `rope_type` of every rotary embedding: one for the model, or one a layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for entry in (parameters, *parameters.values()):
        if isinstance(entry, dict) and isinstance(entry.get("rope_type"), str):
            yield entry["rope_type"]


def _moving(name: str, rope: str) -> str:
    return (
        f"{name} uses {rope} rotary positions, whose frequencies follow the longest request of a batch: a request "
        "would change its neighbours' answers"
    )


@torch.inference_mode()
def fix_frequencies(model: PreTrainedModel, max_model_len: int) -> None:
    """Where a model has one set of rotary frequencies for short texts and one for long ones, settle on that of the
    longest request allowed, for every request: transformers chooses anew at each step, by its longest row.

    Raises `StartupError` where that has no effect.
    """
    if TWO_ROPES not in _rope_types(text_config(model)):
        return
    embeddings: list[Any] = [module for module in model.modules() if getattr(module, "rope_type", None) == TWO_ROPES]
    x, first = torch.zeros(1, device=model.device), torch.zeros(1, 1, dtype=torch.long, device=model.device) + 1
    last = first + max_model_len - 2
    for embedding in embeddings:
        settled = embedding(x, torch.cat((first, last), dim=1))[0][:, :1]
        embedding.rope_type = "default"  # of the module, whose forward chooses by it; the frequencies stay
        alone = embedding(x, first)[0]
        if not torch.equal(settled, alone):
            raise StartupError(_moving(type(model).__name__, TWO_ROPES))
    if not embeddings:
        raise StartupError(_moving(type(model).__name__, TWO_ROPES))


def use_paged_attention(model: PreTrainedModel) -> None:
    """Switch the model to our attention function; raise `StartupError` where that has no effect."""
    register()
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except ValueError as error:
        raise StartupError(f"{type(model).__name__} does not take another attention function: {error}") from error
    if text_config(model)._attn_implementation != IMPLEMENTATION:
        raise StartupError(f"{type(model).__name__} keeps its own attention, so requests cannot be batched apart")


def probe_tokens(model: PreTrainedModel) -> list[Tensor]:
    """A few sequences of arbitrary tokens, (length,) each."""
    vocabulary = text_config(model).vocab_size
    return [(torch.arange(length) * 7919 + 31 * length) % vocabulary for length in PROBE_LENGTHS]


@torch.inference_mode()
def separate_logits(model: PreTrainedModel) -> Tensor:
    """Logits of each probe sequence on its own, by transformers' plain attention: (tokens, vocabulary)."""
    model.set_attn_implementation("eager")  # the only one that has every feature: sdpa leaves soft-capping out
    batches = [tokens[None].to(model.device) for tokens in probe_tokens(model)]
    return torch.cat([model(input_ids=batch, use_cache=False).logits[0] for batch in batches])


def check_packed(model: PreTrainedModel, packed: Tensor, separate: Tensor) -> None:
    """Raise `StartupError` unless a packed forward gave the logits of separate ones, up to rounding."""
    limit, found = TOLERANCE[model.dtype], deviation(packed, separate)
    if not found <= limit:
        raise StartupError(
            f"{type(model).__name__} gives other logits in a batch than alone (differing by {found:.2g} of their "
            f"spread, at most {limit:.2g} allowed): it cannot be served"
        )


def deviation(packed: Tensor, separate: Tensor) -> float:
    """How far logits (tokens, vocabulary) differ: |packed − separate| / |separate − its mean|, at three of four tokens.

    The fourth may be one whose logits hardly differ from each other, which in 16 bits is all rounding. Seen on Gemma 3
    270M in bfloat16: 0.1 by rounding, and 1.0 when requests see each other.
    """
    packed, separate = packed.float(), separate.float()
    spread = (separate - separate.mean(dim=1, keepdim=True)).norm(dim=1)
    return float(((packed - separate).norm(dim=1) / spread).quantile(0.75))


@dataclass
class ForwardRecord:
    """What one forward of `num_rows` tokens called: attention layers with the (heads, size) of their keys and values,
    and the linear layers, with their input and the number of rows of each call."""

    num_rows: int
    attention: dict[nn.Module, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    linears: dict[str, list[int]] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def adaptable(self, name: str) -> bool:
        """Whether the linear's rows are the batch's rows, so that each can have its own adapter."""
        return self.linears.get(name) == [self.num_rows]

    def sharing_input(self) -> list[list[str]]:
        """The adaptable layers, those that took the very same tensor together."""
        groups: dict[int, list[str]] = {}
        for name, tensor in self.inputs.items():
            if self.adaptable(name):
                groups.setdefault(id(tensor), []).append(name)
        return list(groups.values())


class _Recorder:
    """Stands in for a layer's cache during the recorded forward."""

    def __init__(self, module: nn.Module, record: ForwardRecord) -> None:
        self.module = module
        self.record = record

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        if self.module in self.record.attention:
            raise StartupError(f"{type(self.module).__name__} attends twice in one forward: it cannot be served")
        self.record.attention[self.module] = (
            torch.Size((key.shape[1], key.shape[3])), torch.Size((value.shape[1], value.shape[3]))
        )  # fmt: skip
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


@contextmanager
def _recording(model: PreTrainedModel, record: ForwardRecord) -> Iterator[None]:
    modules = list(model.modules())
    linears = [(name, module) for name, module in model.named_modules() if linear_shape(module) is not None]
    handles = [module.register_forward_hook(_row_counter(name, record)) for name, module in linears]
    for module in modules:
        setattr(module, ATTRIBUTE, _Recorder(module, record))
    try:
        yield
    finally:
        for module in modules:
            delattr(module, ATTRIBUTE)
        for handle in handles:
            handle.remove()


def _row_counter(name: str, record: ForwardRecord) -> Callable[[nn.Module, Any, Tensor], None]:
    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        record.linears.setdefault(name, []).append(output.numel() // output.shape[-1])
        record.inputs[name] = inputs[0]

    return count


@torch.inference_mode()
def record_forward(model: PreTrainedModel) -> ForwardRecord:
    """Run a forward with our attention to see what it calls.

    Raises `StartupError` unless every layer of the model attends exactly once (no recurrent or shared layers).
    """
    tokens = torch.cat(probe_tokens(model)).to(model.device)
    record = ForwardRecord(len(tokens))
    with _recording(model, record):
        model(
            input_ids=tokens[None], position_ids=torch.arange(len(tokens), device=model.device)[None], use_cache=False
        )
    layers = text_config(model).num_hidden_layers
    if len(record.attention) != layers:
        raise StartupError(
            f"{type(model).__name__} has {layers} layers, of which {len(record.attention)} attend through "
            "transformers' attention interface: it cannot be served"
        )
    return record
