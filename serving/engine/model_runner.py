"""A step's plan → one flat forward → logits of the rows that need them. Knows no queues, tenants or text."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from serving.engine.attention import ATTRIBUTE, AttentionStep, PagedLayer, Span
from serving.engine.compatibility import (
    ForwardRecord,
    check_configuration,
    check_packed,
    fix_frequencies,
    probe_tokens,
    record_forward,
    separate_logits,
    text_config,
    use_paged_attention,
)
from serving.engine.linears import MakeProduct, Product, lay_out
from serving.engine.memory import commit, free_memory
from serving.engine.norms import fuse_norms
from serving.engine.quantization import Int8Product, check_quantization
from serving.engine.request import Chunk, Fill, RequestState, StepPlan
from serving.engine.rotary import fuse_rotary
from serving.errors import StartupError
from serving.types import EngineSettings
from vblora.batched import AdapterSlots, Segment
from vblora.compact import CompactAdapter, SlotLayout

DEFAULT_CACHE_BYTES = 4 << 30
FREE_MEMORY_SHARE = 0.25


class StepOutput(NamedTuple):
    """What a step computed: `logits` (n, vocabulary) of the last token of every chunk that samples, in the plan's
    order; those of all tokens of the chunks that score their prompt; and for the requests that pool, the sum of their
    chunk's last hidden states, (hidden,) in float32."""

    logits: Tensor
    scored: list[tuple[Chunk, Tensor]]
    hidden: list[tuple[RequestState, Tensor]]


class ModelRunner:
    """The base model with its paged cache and its adapter slots.

    Takes over `model`: its attention is switched, its norms and linear layers are replaced. Raises `StartupError` for a
    model that would run wrong, or a cache that cannot hold one request of full length.
    """

    def __init__(self, model: PreTrainedModel, settings: EngineSettings) -> None:
        self.model = model  # in eval mode, as loaded
        self.block_size = settings.block_size
        check_configuration(model)
        check_quantization(settings.quantization, model.device, model.dtype)
        fix_frequencies(model, self._wanted_length(settings))
        separate = separate_logits(model)
        use_paged_attention(model)
        record = record_forward(model)
        self.layout = SlotLayout.from_model(model, max_rank=settings.max_rank, adaptable=record.adaptable)
        self.slots = self._make_slots(settings)
        shapes = list(record.attention.values())
        self.bytes_per_token = sum(key.numel() + value.numel() for key, value in shapes) * model.dtype.itemsize
        self.num_blocks, self.max_model_len = self._fit_cache(settings)
        self._layers: list[PagedLayer] = []
        self._hidden = torch.empty(0)  # the last hidden states (tokens, hidden) of the present step
        for module, (key, value) in record.attention.items():
            positions = self.num_blocks * self.block_size
            layer = PagedLayer(positions, key, value, dtype=model.dtype, device=model.device)
            setattr(module, ATTRIBUTE, layer)
            self._layers.append(layer)
        model.base_model.register_forward_hook(self._keep_hidden)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        if settings.quantization is None:
            self._lay_out(record, Product)
        check_packed(model, self._probe(), separate)  # on arbitrary tokens, where 8 bits change more than on text
        if settings.quantization is not None:
            self._lay_out(record, Int8Product)
        self.committing = commit([cache for layer in self._layers for cache in (layer.keys, layer.values)])

    def _lay_out(self, record: ForwardRecord, product: MakeProduct) -> None:
        """Put the layers of the engine in the places of the model's."""
        lay_out(self.model, record.sharing_input(), self.slots, product)
        fuse_norms(self.model)
        fuse_rotary(record.attention)

    def _fit_cache(self, settings: EngineSettings) -> tuple[int, int]:
        """Blocks that fit the memory, and the longest request allowed: one of that length must fit them."""
        wanted = self._wanted_length(settings)
        free = free_memory(self.model.device)
        memory = settings.kv_cache_bytes or min(DEFAULT_CACHE_BYTES, int(free * FREE_MEMORY_SHARE))
        if memory > free:
            raise StartupError(f"kv-cache-memory is {memory:,} bytes, but {free:,} are free: lower it")
        blocks = memory // (self.bytes_per_token * self.block_size)
        capacity = blocks * self.block_size
        if capacity < (settings.max_model_len or 1):
            raise StartupError(
                f"the key/value cache of {memory:,} bytes holds {capacity} tokens, fewer than one request of "
                f"max-model-len {wanted}: raise kv-cache-memory or lower max-model-len"
            )
        return blocks, min(wanted, capacity)

    def _make_slots(self, settings: EngineSettings) -> AdapterSlots:
        number = settings.adapter_slots or settings.max_batch_size + 1
        dtype = self.model.dtype if settings.adapter_dtype == "auto" else getattr(torch, settings.adapter_dtype)
        needed, free = self.layout.slot_bytes(dtype) * number, free_memory(self.model.device)
        if needed > free:
            raise StartupError(
                f"{number} adapter slots for ranks up to {settings.max_rank} take up to {needed:,} bytes, but {free:,} "
                "are free: lower adapter-slots (or max-batch-size, which it follows) or max-rank"
            )
        return AdapterSlots(self.layout, number, dtype=dtype, device=self.model.device)

    def _wanted_length(self, settings: EngineSettings) -> int:
        context = int(text_config(self.model).max_position_embeddings)
        wanted = settings.max_model_len or context
        if wanted > context:
            raise StartupError(f"max-model-len is {wanted}, but the model's positions end at {context}")
        return wanted

    def _probe(self) -> Tensor:
        """Logits of the probe sequences in one flat batch. Blocks are handed out from the last, to see them used."""
        tables, last = [], self.num_blocks
        for tokens in probe_tokens(self.model):
            count = -(-len(tokens) // self.block_size)
            if last < count:
                raise StartupError(f"the key/value cache holds {self.num_blocks} blocks: too few to run anything")
            tables.append(list(range(last - count, last)))
            last -= count
        sequences = probe_tokens(self.model)
        spans = [Span(table, 0, len(tokens)) for table, tokens in zip(tables, sequences, strict=True)]
        tokens = torch.cat(sequences)
        return self._forward(tokens.tolist(), spans, [Segment(0, len(tokens))], range(len(tokens)))

    def fill(self, fills: Sequence[Fill], content: Callable[[str], CompactAdapter]) -> list[float]:
        """Compose the revisions that a plan brings into slots; returns the seconds each took."""
        seconds = []
        for fill in fills:
            began = time.perf_counter()
            self.slots.fill(fill.slot, content(fill.revision))
            seconds.append(time.perf_counter() - began)
        return seconds

    def run(self, plan: StepPlan) -> StepOutput:
        """Run the model on what the plan says."""
        tokens = [token for chunk in plan.chunks for token in chunk.state.tokens[chunk.start : chunk.end]]
        spans = [Span(chunk.state.block_table, chunk.start, chunk.length) for chunk in plan.chunks]
        segments = [Segment(chunk.state.slot, chunk.length) for chunk in plan.chunks]
        keep: list[int] = []  # rows of the batch whose logits are computed
        last: list[int] = []  # among those, the last of every chunk that samples
        scored: list[tuple[Chunk, slice]] = []
        pooled: list[tuple[Chunk, slice]] = []
        end = 0
        for chunk in plan.chunks:
            begin, end = end, end + chunk.length
            if chunk.state.scoring:
                scored.append((chunk, slice(len(keep), len(keep) + chunk.length)))
                keep += range(begin, end)
            elif chunk.samples:
                keep.append(end - 1)
            if chunk.samples:
                last.append(len(keep) - 1)
            if chunk.state.request.pooled:
                pooled.append((chunk, slice(begin, end)))
        logits = self._forward(tokens, spans, segments, keep)
        hidden = self._hidden if pooled else logits
        return StepOutput(
            logits if len(last) == len(keep) else logits[last],
            [(chunk, logits[rows]) for chunk, rows in scored],
            [(chunk.state, hidden[rows].float().sum(0)) for chunk, rows in pooled],
        )

    def _keep_hidden(self, _: nn.Module, __: object, output: BaseModelOutputWithPast) -> None:
        if output.last_hidden_state is None:
            raise RuntimeError("the model gives no last hidden state")
        self._hidden = output.last_hidden_state[0]

    @torch.inference_mode()
    def _forward(
        self, tokens: list[int], spans: Sequence[Span], segments: Sequence[Segment], keep: Sequence[int]
    ) -> Tensor:
        device = self.model.device
        step = AttentionStep(spans, self.block_size, device)
        for layer in self._layers:
            layer.step = step
        self.slots.set_rows(segments)
        positions = torch.cat([torch.arange(span.start, span.start + span.length) for span in spans])
        rows = torch.tensor(list(keep), dtype=torch.long, device=device)
        options = {"logits_to_keep": rows} if self._keeps_logits else {}
        logits: Tensor = self.model(
            input_ids=torch.tensor(tokens, device=device)[None],
            position_ids=positions.to(device)[None],
            use_cache=False,
            **options,
        ).logits[0]
        return logits if self._keeps_logits else logits[rows]
