"""Paged attention over scattered blocks against dense attention computed the long way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.engine.attention import FILL, AttentionOptions, AttentionStep, PagedLayer, Span
from vblora import kernels

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 8, 4
TABLES = ([7, 2, 9], [1, 8, 3], [4, 0, 5])
LENGTHS = (10, 6, 11)  # tokens so far
NEW = (1, 1, 7)  # of which these are new: two decode rows and a chunk


def dense(query: Tensor, key: Tensor, value: Tensor, start: int, options: AttentionOptions) -> Tensor:
    """One request: query (new, heads, size), key and value (all, kv heads, size)."""
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * options.scaling
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    position, past = torch.arange(start, start + len(query))[:, None], torch.arange(len(key))
    hidden = past > position
    if options.window:
        hidden |= position - past >= options.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks[:, None, None].expand(-1, len(query), 1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(0.3),
        AttentionOptions(0.3, window=3),
        AttentionOptions(0.3, softcap=2.0),
        AttentionOptions(0.3, window=4, softcap=2.0),
        AttentionOptions(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    ],
    ids=["full", "window", "softcap", "window and softcap", "sinks"],
)
@pytest.mark.usefixtures("either_kernels")
def test_paged_attention_equals_dense_attention(options: AttentionOptions) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = PagedLayer(10 * BLOCK, (KV_HEADS, SIZE), (KV_HEADS, SIZE), dtype=torch.float32, device=torch.device("cpu"))
    keys = [torch.randn(n, KV_HEADS, SIZE, generator=generator) for n in LENGTHS]
    values = [torch.randn(n, KV_HEADS, SIZE, generator=generator) for n in LENGTHS]
    queries = [torch.randn(n, HEADS, SIZE, generator=generator) for n in NEW]
    for table, length, new, key, value in zip(TABLES, LENGTHS, NEW, keys, values, strict=True):
        if length > new:
            old = AttentionStep([Span(list(table), 0, length - new)], BLOCK, torch.device("cpu"))
            layer.keys[old.targets], layer.values[old.targets] = key[: length - new], value[: length - new]
    spans = [Span(list(t), length - new, new) for t, length, new in zip(TABLES, LENGTHS, NEW, strict=True)]
    layer.step = AttentionStep(spans, BLOCK, torch.device("cpu"))
    flat = [
        torch.cat([part[-new:] for part, new in zip(parts, NEW, strict=True)]).transpose(0, 1)[None]
        for parts in (queries, keys, values)
    ]
    got = layer.attend(flat[0], flat[1], flat[2], options)[0].split(NEW)
    for index, (length, new) in enumerate(zip(LENGTHS, NEW, strict=True)):
        expected = dense(queries[index], keys[index], values[index], length - new, options)
        assert torch.allclose(got[index], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 1), (10, 2)], ids=str)
def test_the_kernel_equals_the_batched_products(
    heads: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of very different lengths, heads that do not come in fours, values of another size than keys, and so much
    work that it is shared among threads."""
    generator = torch.Generator().manual_seed(0)
    lengths, blocks, key_size, value_size = (1, 300, 17, 64), 19, 24, 40
    layer = PagedLayer(
        4 * blocks * 16, (heads[1], key_size), (heads[1], value_size), dtype=dtype, device=torch.device("cpu")
    )
    layer.keys.copy_(torch.randn(layer.keys.shape, generator=generator))
    layer.values.copy_(torch.randn(layer.values.shape, generator=generator))
    tables = torch.randperm(4 * blocks, generator=generator).view(4, blocks).tolist()
    layer.step = AttentionStep(
        [Span(table, length - 1, 1) for table, length in zip(tables, lengths, strict=True)], 16, torch.device("cpu")
    )
    new = [
        torch.randn(1, number, 4, size, generator=generator).to(dtype)
        for number, size in ((heads[0], key_size), (heads[1], key_size), (heads[1], value_size))
    ]
    options = AttentionOptions(0.2, window=50, softcap=3.0, sinks=torch.randn(heads[0], generator=generator))
    for chosen in (options, AttentionOptions(0.2)):
        monkeypatch.setattr(kernels, "available", True)
        got = layer.attend(new[0], new[1], new[2], chosen)
        monkeypatch.setattr(kernels, "available", False)
        expected = layer.attend(new[0], new[1], new[2], chosen)
        assert got.shape == expected.shape == (1, 4, heads[0], value_size)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert torch.allclose(got.float(), expected.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize(("start", "length"), [(0, 2), (5, 64), (30, 65)])
def test_chunks_of_few_sizes_see_no_more_than_is_theirs(start: int, length: int, window: int | None) -> None:
    span = Span(list(range(10)), start, length)
    gather = AttentionStep([span], 16, torch.device("cpu")).prefilling(0, window)
    queries, keys = gather.mask.shape
    assert queries % FILL == keys % FILL == 0 and len(gather.positions) == keys
    first = max(0, start - window + 1) if window else 0
    for query in range(queries):
        position = start + min(query, length - 1)
        seen = (gather.mask[query].nonzero().flatten() + first).tolist()
        assert seen == list(range(max(0, position - window + 1) if window else 0, position + 1))
        assert gather.positions[gather.mask[query]].tolist() == seen
