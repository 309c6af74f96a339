"""Workload W: the demo base, 64 new tokens, random adapters of r 4, h 256, b 128, k 2 on every linear layer."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence

import torch

from serving.engine import Engine
from serving.engine.observer import SilentObserver
from serving.types import EngineObserver, EngineSettings, GenerationRequest, SamplingParams, StepReport
from vblora import VBLoRAConfig
from vblora.checkpoint import AdapterCheckpoint, TopKModule
from vblora.mixture import ModuleShape, TopK, topk_mixture

PROMPT = "The restaurant on the corner of the market square"
RANK, NUM_VECTORS, VECTOR_LENGTH, TOPK = 4, 256, 128, 2


class Recorder(SilentObserver):
    """Keeps every step, the seconds of every composition into a slot, and how long first tokens took."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.compositions: list[float] = []
        self.first_tokens: list[float] = []

    def on_step(self, step: StepReport) -> None:
        self.steps.append(step)

    def on_compose(self, seconds: float) -> None:
        self.compositions.append(seconds)

    def on_first_token(self, seconds: float) -> None:
        self.first_tokens.append(seconds)


def started_engine(settings: EngineSettings, observer: EngineObserver | None = None) -> Engine:
    """An engine whose cache has all of its memory, which it else takes while it answers, in the first seconds."""
    engine = Engine.from_settings(settings, observer)
    engine.runner.committing.join()
    return engine


def random_adapter(engine: Engine, seed: int) -> AdapterCheckpoint:
    """An adapter of workload W with random content, for an engine's base model."""
    return random_content(engine.layout.modules, seed)


def random_content(shapes: Mapping[str, ModuleShape], seed: int) -> AdapterCheckpoint:
    """An adapter of workload W with random content, for modules of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    bank = (torch.rand(NUM_VECTORS, VECTOR_LENGTH, generator=generator) - 0.5) * 0.04

    def logits(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, NUM_VECTORS, generator=generator)

    modules = {
        name: TopKModule(
            topk_mixture(logits(RANK, shape.in_features // VECTOR_LENGTH), TOPK),
            topk_mixture(logits(shape.out_features // VECTOR_LENGTH, RANK), TOPK),
        )
        for name, shape in shapes.items()
    }
    config = VBLoRAConfig(
        r=RANK, num_vectors=NUM_VECTORS, vector_length=VECTOR_LENGTH, topk=TOPK, save_only_topk_weights=True,
        target_modules=sorted({name.rpartition(".")[2] for name in modules}),
    )  # fmt: skip
    return AdapterCheckpoint(config=config, bank=bank, modules=modules, extras={}).topk()


def requests(engine: Engine, count: int, tokens: int, adapters: Sequence[str]) -> list[GenerationRequest]:
    """`count` requests, all at once; row i uses adapter i modulo their number, or the base if there are none."""
    prompt = tuple(engine.codec.encode(PROMPT))
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return [
        GenerationRequest(f"r{row}", "default", prompt, sampling, adapters[row % len(adapters)] if adapters else None)
        for row in range(count)
    ]


def cheap_adapters(engine: Engine, count: int) -> list[str]:
    """`count` distinct adapters on one bank, resident: random indices and weights, without logits in between."""
    generator = torch.Generator().manual_seed(0)
    first = random_adapter(engine, 0)
    result = []
    for _ in range(count):
        modules = {name: TopKModule(*(_redrawn(part, generator) for part in module)) for name, module in _topk(first)}
        result.append(engine.load_adapter(AdapterCheckpoint(first.config, first.bank, modules, {})))
    return result


def _topk(adapter: AdapterCheckpoint) -> list[tuple[str, tuple[TopK, TopK]]]:
    return [(name, (module.a, module.b)) for name, module in adapter.modules.items() if isinstance(module, TopKModule)]


def _redrawn(topk: TopK, generator: torch.Generator) -> TopK:
    weights = torch.rand(topk.weights.shape, generator=generator) + 0.1
    indices = torch.randint(NUM_VECTORS, topk.indices.shape, generator=generator, dtype=topk.indices.dtype)
    return TopK(indices, weights / weights.sum(-1, keepdim=True))


def timed_answers(
    engine: Engine, tokens: int, adapters: Sequence[str], rows: int
) -> tuple[float, list[int], list[list[int]]]:
    """Seconds of whole requests as in `requests`, prefill included, after a short warm-up; their prompt; the tokens of
    each answer."""
    engine.generate(requests(engine, min(rows, engine.settings.max_batch_size), 2, adapters))
    timed = requests(engine, rows, tokens, adapters)
    began = time.perf_counter()
    answers = engine.generate(timed)
    seconds = time.perf_counter() - began
    return seconds, list(timed[0].prompt_token_ids), [list(answer.token_ids) for answer in answers]


def throughput(engine: Engine, tokens: int, adapters: Sequence[str], rows: int) -> float:
    """Tokens a second of `timed_answers`."""
    seconds, _, answers = timed_answers(engine, tokens, adapters, rows)
    assert all(len(answer) == tokens for answer in answers), "every request must generate all its tokens"
    return rows * tokens / seconds


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
