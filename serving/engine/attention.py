"""Attention over a paged key/value cache, for one flat batch of decode rows and prefill chunks.

transformers' attention interface calls `paged_attention` once a layer. Registration there is global to the process
and not every model passes keywords on, so the layer finds its cache and its step on the attention module itself.
Knows no requests: a step is positions in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from serving.engine.memory import lazy_zeros
from vblora import kernels

IMPLEMENTATION = "vblora_paged"
ATTRIBUTE = "vblora_paged_layer"
FILL = 64  # what numbers of queries and keys of a chunk are filled up to


def filled(number: int) -> int:
    """The next multiple of `FILL`."""
    return -(-number // FILL) * FILL


class Span(NamedTuple):
    """One request's part of a step: `length` tokens from position `start`, over the cache blocks of `block_table`."""

    block_table: list[int]
    start: int
    length: int


class _Gather(NamedTuple):
    """Cache positions (n, keys) that decode rows read, and which of them count."""

    positions: Tensor
    mask: Tensor


@dataclass
class AttentionStep:
    """Where one step's tokens go in the cache, and what each may see. Spans of one token, decode rows, come first:
    `lengths` (n,) and `tables` (n, blocks) of these are int32."""

    spans: Sequence[Span]
    block_size: int
    device: torch.device
    targets: Tensor = field(init=False)
    num_decoding: int = field(init=False)
    lengths: Tensor = field(init=False)
    tables: Tensor = field(init=False)
    _decode: dict[int | None, _Gather] = field(init=False, default_factory=dict)
    _slots: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.num_decoding = sum(span.length == 1 for span in self.spans)
        decoding = self.spans[: self.num_decoding]
        ends = [span.block_table[span.start // self.block_size] * self.block_size + span.start % self.block_size
                for span in decoding]  # fmt: skip
        parts = [self._positions(index)[span.start :] for index, span in enumerate(self.spans) if span.length > 1]
        self.targets = torch.cat([torch.tensor(ends, dtype=torch.long), *parts]).to(self.device)
        self.lengths = torch.tensor([span.start + 1 for span in decoding], dtype=torch.int32)
        longest = max((len(span.block_table) for span in decoding), default=0)
        tables = [span.block_table + [0] * (longest - len(span.block_table)) for span in decoding]
        self.tables = torch.tensor(tables, dtype=torch.int32)

    def _positions(self, index: int) -> Tensor:
        if index not in self._slots:
            self._slots[index] = self._cache_positions(self.spans[index])
        return self._slots[index]

    def _cache_positions(self, span: Span) -> Tensor:
        """Positions in the cache of the span's tokens, from the request's first to the span's last."""
        end = span.start + span.length
        blocks = torch.tensor(span.block_table[: -(-end // self.block_size)])
        return (blocks[:, None] * self.block_size + torch.arange(self.block_size)).flatten()[:end]

    def decoding(self, window: int | None) -> _Gather:
        """What the decode rows read, at most the last `window` positions each; padded on the right."""
        if window not in self._decode:
            slots = [self._positions(index)[-(window or 0) :] for index in range(self.num_decoding)]
            lengths = torch.tensor([len(positions) for positions in slots])
            padded = nn.utils.rnn.pad_sequence(slots, batch_first=True)
            mask = torch.arange(padded.shape[1]) < lengths[:, None]
            self._decode[window] = _Gather(padded.to(self.device), mask.to(self.device))
        return self._decode[window]

    def prefilling(self, index: int, window: int | None) -> _Gather:
        """What the chunk `spans[index]` reads: positions (keys,) and a causal mask (queries, keys).

        Both numbers are filled up to a multiple of `FILL`, since torch's kernels compile code for each number and keep
        it: with keys that no query sees, and queries that see what the last one does.
        """
        span, positions = self.spans[index], self._positions(index)
        end = span.start + span.length
        first = max(0, span.start - window + 1) if window else 0
        queries = torch.arange(span.start, span.start + filled(span.length))[:, None].clamp_max(end - 1)
        keys = torch.arange(first, first + filled(end - first))
        mask = keys <= queries
        if window:
            mask &= queries - keys < window
        padded = F.pad(positions[first:], (0, len(keys) - (end - first)))
        return _Gather(padded.to(self.device), mask.to(self.device))


class PagedLayer:
    """One attention layer's keys and values: (positions, kv heads, head size) each, and the step under way."""

    def __init__(
        self,
        num_positions: int,
        key_shape: Sequence[int],
        value_shape: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys = lazy_zeros(num_positions, *key_shape, dtype=dtype, device=device)
        self.values = lazy_zeros(num_positions, *value_shape, dtype=dtype, device=device)
        self.step: AttentionStep | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Write the step's keys and values (1, kv heads, tokens, size), then attend: (1, tokens, heads, size)."""
        step = self.step
        assert step is not None, "a forward outside of a step"
        self._store(self.keys, key[0], step.targets)
        self._store(self.values, value[0], step.targets)
        queries = query[0].transpose(0, 1)
        if step.num_decoding == len(step.spans):
            return self._attend_decoding(step, queries, options)[None]
        outputs = []
        if step.num_decoding:
            outputs.append(self._attend_decoding(step, queries[: step.num_decoding], options))
        start = step.num_decoding
        for index in range(step.num_decoding, len(step.spans)):
            end = start + step.spans[index].length
            gather = step.prefilling(index, options.window)
            keys, values = self.keys[gather.positions][None], self.values[gather.positions][None]
            attend = grouped_attention if options.needs_scores else fused_attention
            asked = F.pad(queries[start:end], (0, 0, 0, 0, 0, len(gather.mask) - (end - start)))
            outputs.append(attend(asked[None], keys, values, gather.mask[None], options)[0, : end - start])
            start = end
        return torch.cat(outputs)[None]

    @staticmethod
    def _store(cache: Tensor, fresh: Tensor, targets: Tensor) -> None:
        """Write the step's keys or values (kv heads, tokens, size) to their positions."""
        if kernels.usable(cache) and fresh.dtype == cache.dtype and fresh.stride(-1) == 1:
            kernels.store(cache, fresh, targets)
        else:
            cache[targets] = fresh.transpose(0, 1).to(cache.dtype)

    def _attend_decoding(self, step: AttentionStep, queries: Tensor, options: AttentionOptions) -> Tensor:
        """One query a row: (n, heads, size) → (n, heads, size of a value)."""
        if kernels.usable(self.keys) and queries.dtype == self.keys.dtype and queries.stride(-1) == 1:
            return kernels.decode_attention(
                queries, self.keys, self.values, step.tables, step.lengths, block_size=step.block_size,
                window=options.window, scaling=options.scaling, softcap=options.softcap, sinks=options.sinks,
            )  # fmt: skip
        gather = step.decoding(options.window)
        keys, values = self.keys[gather.positions], self.values[gather.positions]
        return grouped_attention(queries[:, None], keys, values, gather.mask[:, None], options)[:, 0]


class AttentionOptions(NamedTuple):
    """What a model asks of its attention: a window of positions, soft-capped scores, attention sinks (heads,)."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def needs_scores(self) -> bool:
        """Whether the scores themselves are changed, which fused kernels do not offer."""
        return self.softcap is not None or self.sinks is not None


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """Attention by two batched products: query (n, queries, heads, d), key and value (n, keys, kv heads, d), mask
    (n, queries, keys). Query heads that share a key head are rows of one product. Returns (n, queries, heads, d)."""
    n, queries, heads, size = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    grouped = query.reshape(n, queries, kv_heads, group, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (grouped @ key.permute(0, 2, 3, 1)).float() * options.scaling
    scores = scores.reshape(n, kv_heads, group, queries, -1)
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, kv_heads, -1, 1, 1).expand(n, -1, -1, queries, 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    output = weights.to(value.dtype).flatten(2, 3) @ value.transpose(1, 2)  # (n, kv, group · queries, size of a value)
    return output.reshape(n, kv_heads, group, queries, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """The same by PyTorch's fused kernel, which never holds all scores: shapes as in `grouped_attention`."""
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask[:, None], scale=options.scaling,
        enable_gqa=True,
    )  # fmt: skip
    return output.transpose(1, 2)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function given to transformers: (1, heads, tokens, size) → (1, tokens, heads, size)."""
    options = AttentionOptions(scaling or query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    layer: PagedLayer = getattr(module, ATTRIBUTE)
    return layer.attend(query, key, value, options), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Masks are the step's business."""


def register() -> None:
    """Make the implementation known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
