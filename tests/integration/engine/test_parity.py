"""Every request of a mixed batch gets the tokens of `generate` on the base with that one adapter merged.

Float32, greedy. Before comparing, the test makes sure that it could fail: that attention, the adapter, the right
adapter and the window each matter to more than half of the tokens, that no choice was a near tie, and that requests
were preempted on the way, or found their prompts in the cache. The last test is about a step in bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from serving.adapters.residency import Residency
from serving.engine import linears
from serving.engine.attention import Span
from serving.engine.compatibility import deviation
from serving.engine.model_runner import ModelRunner
from serving.types import EngineSettings, EngineStats, GenerationRequest, SamplingParams
from tests.integration.engine.conftest import tiny_core
from tests.support import FAMILIES, random_adapter, tiny_model
from vblora import kernels
from vblora.batched import Segment
from vblora.checkpoint import AdapterCheckpoint, content_hash, write_adapter
from vblora.compact import linear_shape, output_layer_name
from vblora.model import VBLoRAModel

NEW_TOKENS = 20
BLOCK_SIZE = 8
CACHE_BLOCKS = 14  # of 8 tokens: one request of full length, but not the twelve below
ROOMY_CACHE_BLOCKS = 400
MAX_MODEL_LEN = 96
PROMPT_LENGTHS = (3, 50, 9, 31, 70, 5, 22, 41, 13, 60, 2, 27)
LEAST_GAP = 1e-4
OUTPUTS_OF_ATTENTION = ("o_proj", "attn.c_proj", "self_attn.out_proj", "attention.dense")
GREATEST_VECTOR_LENGTH = 32
SEEDS = {"phi3": 5, "gpt_neox": 5}  # where the usual weights have two best tokens that are nearly equal


def adaptable(model: PreTrainedModel) -> list[str]:
    """The linear layers but the output layer and the routers, whose few outputs no vector divides."""
    shapes = {name: linear_shape(module) for name, module in model.named_modules()}
    output = output_layer_name(model)
    return [
        name
        for name, shape in shapes.items()
        if shape and name != output and not any(size % GREATEST_VECTOR_LENGTH for size in shape)
    ]


def adapters_for(model: PreTrainedModel) -> list[AdapterCheckpoint]:
    linears = adaptable(model)
    everything, attention = linears, [path for path in linears if "attn" in path or "attention" in path]
    return [
        random_adapter(model, rank=2, num_vectors=24, vector_length=8, topk=1, targets=everything, seed=1),
        random_adapter(model, rank=4, num_vectors=16, vector_length=16, topk=2, targets=everything, seed=2),
        random_adapter(model, rank=8, num_vectors=40, vector_length=32, topk=3, targets=everything, seed=3),
        random_adapter(model, rank=4, num_vectors=300, vector_length=8, topk=2, targets=attention, seed=4),
        random_adapter(model, rank=8, num_vectors=24, vector_length=8, topk=4, targets=everything, seed=5),
    ]


def merged(model: PreTrainedModel, adapter: AdapterCheckpoint | None, folder: Path) -> PreTrainedModel:
    base = copy.deepcopy(model)
    if adapter is None:
        return base
    write_adapter(folder, adapter)
    result = VBLoRAModel.from_pretrained(base, folder).merge_and_unload()
    assert isinstance(result, PreTrainedModel)
    return result


def generate(model: PreTrainedModel, prompt: Sequence[int]) -> tuple[list[int], float]:
    """transformers' greedy tokens, and the least distance between the two best logits on the way."""
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack([step[0] for step in output.logits]).topk(2).values
    return output.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def without_attention(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name.endswith(OUTPUTS_OF_ATTENTION):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return model


def without_window(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights with every layer attending to everything."""
    config = copy.deepcopy(model.config)
    config.sliding_window = 10_000
    wide = type(model)(config).eval()
    wide.load_state_dict(model.state_dict())
    return wide


def changed(tokens: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The share of tokens that differ."""
    pairs = [a != b for row, other in zip(tokens, others, strict=True) for a, b in zip(row, other, strict=True)]
    return sum(pairs) / len(pairs)


def serve(
    model: PreTrainedModel,
    adapters: list[AdapterCheckpoint],
    work: Sequence[tuple[int | None, list[int]]],
    cache_blocks: int,
) -> tuple[list[list[int]], EngineStats]:
    """Run the work through the engine, two requests arriving every third step; returns tokens and what it counted."""
    settings = EngineSettings(
        model="tiny", max_batch_size=8, max_batched_tokens=24, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN,
        max_rank=8, kv_cache_bytes=cache_blocks * BLOCK_SIZE * bytes_per_token(model),
    )  # fmt: skip
    runner = ModelRunner(copy.deepcopy(model), settings)
    residency = Residency()
    for adapter in adapters:
        residency.put(content_hash(adapter), runner.layout.compact(adapter))
    core = tiny_core(runner, residency, settings)
    waiting = list(enumerate(work))
    tokens: list[list[int]] = [[] for _ in work]
    step = 0
    while waiting or core.has_work:
        if step % 3 == 0:
            for index, (which, prompt) in waiting[:2]:
                revision = None if which is None else content_hash(adapters[which])
                if revision:
                    residency.pin(revision)
                params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
                core.add(GenerationRequest(str(index), "default", tuple(prompt), params, revision), 0.0)
            waiting = waiting[2:]
        for event in core.step():
            assert event.finish_reason in (None, "length"), event
            tokens[int(event.request_id)] += event.token_ids
        step += 1
    stats = core.stats()
    assert stats.kv_blocks_used == stats.slots_used == stats.requests_running == 0
    return tokens, stats


def bytes_per_token(model: PreTrainedModel) -> int:
    return ModelRunner(copy.deepcopy(model), EngineSettings(model="tiny", kv_cache_bytes=1 << 20)).bytes_per_token


@pytest.mark.usefixtures("either_kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_equals_generate_on_merged_models(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, seed=SEEDS.get(family, 0))
    adapters = adapters_for(model)
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    which = [None if index % 6 == 5 else index % 6 for index in range(len(prompts))]
    choices: list[AdapterCheckpoint | None] = [*adapters, None]
    models = {
        index: merged(model, choices[-1 if index is None else index], tmp_path / str(index)) for index in set(which)
    }

    expected, gaps = zip(*(generate(models[w], prompt) for w, prompt in zip(which, prompts, strict=True)), strict=True)
    adapted = [index for index, w in enumerate(which) if w is not None]

    def share_changed(rows: Sequence[int], other: dict[int, PreTrainedModel]) -> float:
        return changed([expected[row] for row in rows], [generate(other[row], prompts[row])[0] for row in rows])

    everyone = range(len(prompts))
    assert min(gaps) >= LEAST_GAP
    assert share_changed(everyone, {row: without_attention(models[which[row]]) for row in everyone}) > 0.5
    assert share_changed(adapted, dict.fromkeys(adapted, models[None])) > 0.5
    neighbour = {row: models[(which[row] + 1) % len(adapters)] for row in adapted}
    assert share_changed(adapted, neighbour) > 0.5
    if getattr(model.config, "sliding_window", None):
        assert share_changed(everyone, {row: without_window(models[which[row]]) for row in everyone}) > 0.5

    work = list(zip(which, prompts, strict=True))
    tokens, stats = serve(model, adapters, work, CACHE_BLOCKS)
    assert stats.preemptions > 0
    assert tokens == list(expected)
    answered = [(index, [*prompt, *answer]) for (index, prompt), answer in zip(work, expected, strict=True)]
    fitting = [(index, text) for index, text in answered if len(text) + NEW_TOKENS <= MAX_MODEL_LEN]
    again = [(index, text[:-1]) for index, text in fitting]
    tokens, stats = serve(model, adapters, [*work, *again], ROOMY_CACHE_BLOCKS)
    assert stats.prefix_hits > 0.8 * sum(len(prompt) for _, prompt in again)
    assert tokens[: len(work)] == list(expected)
    assert [row[0] for row in tokens[len(work) :]] == [text[-1] for _, text in fitting]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_bfloat16_rounds_no_more_than_without_the_fast_paths(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits with packed weights, siblings in one product and kernels, and without them, beside those in float32: each
    may be as far from float32 as rounding to bfloat16 brings it, and the fast ones at most a half farther."""
    model = tiny_model(family)
    adapters = adapters_for(model)

    def logits(dtype: torch.dtype) -> torch.Tensor:
        settings = EngineSettings(model="tiny", max_rank=8, kv_cache_bytes=1 << 21, block_size=BLOCK_SIZE)
        runner = ModelRunner(copy.deepcopy(model).to(dtype), settings)
        for slot, adapter in enumerate(adapters, start=1):
            runner.slots.fill(slot, runner.layout.compact(adapter))
        generator = torch.Generator().manual_seed(3)
        prompts = torch.randint(3, 300, (6, 21), generator=generator).tolist()
        tables = [[3 * row, 3 * row + 1, 3 * row + 2] for row in range(6)]
        prefill = [Span(table, 0, 20) for table in tables]
        flat = [token for prompt in prompts for token in prompt[:20]]
        segments = [Segment(row, 20) for row in range(6)]
        first = runner._forward(flat, prefill, segments, range(0, 120, 7))
        decode = [Span(table, 20, 1) for table in tables]
        last = [prompt[20] for prompt in prompts]
        second = runner._forward(last, decode, [Segment(row, 1) for row in range(6)], range(6))
        return torch.cat((first, second))

    exact, fast = logits(torch.float32), logits(torch.bfloat16)
    monkeypatch.setattr(kernels, "available", False)
    monkeypatch.setattr(linears, "packable", lambda weight: False)
    slow = logits(torch.bfloat16)
    assert not torch.equal(fast, slow)
    rounding = deviation(slow, exact)
    assert rounding < 0.2, "so much rounding that the comparison shows nothing"
    assert deviation(fast, exact) <= 1.5 * rounding
