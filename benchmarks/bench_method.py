"""The method beside PEFT's VB-LoRA: a layer, a token, a training step of the demo model, and its peak memory.

Both sides start from the same adapters, in fresh processes, in turn. (a) forward and backward of one 640 → 2048 linear
with its adapter, 512 tokens, h 256, b 128, k 2, r 4; its input needs no gradient in the first figure and has one in the
second, where the frozen layer's own product takes most of the time on both sides. (b) forward of one token without
gradients. (c) a step of 8 rows on all linears of the demo model, and (d) the most memory that it had resident. `base`
is the layer without an adapter. Seconds are medians; the ratio is PEFT's over ours. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.sides import fresh_process
from benchmarks.workload import machine
from vblora import VBLoRAConfig, VBLoRAModel, get_vblora_model
from vblora.data import encode, read_rows
from vblora.integrations.base_models import load_base_model
from vblora.loop import TrainingLoop, TrainingOptions
from vblora.loss import pad_token

SHAPE: dict[str, Any] = {"r": 4, "num_vectors": 256, "vector_length": 128, "topk": 2}
SIDES = ("ours", "peft")
ROWS = Path(__file__).parents[1] / "examples" / "customers" / "quillstone.train.jsonl"
IN, OUT, TOKENS, BATCH = 640, 2048, 512, 8
WARM_UP, LAYER_REPEATS = 20, 100
FIGURES = ("layer_s", "layer_with_input_gradient_s", "token_s", "step_s", "peak_bytes")
# What both sides must agree on before their speed is compared: the layer's output, the gradient of its bank, the loss.
AGREEMENT = {"output": 1e-5, "gradient": 1e-3, "loss": 1e-4}


class Layer(nn.Module):
    """One linear layer in a model, as both libraries want it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def layer() -> Layer:
    torch.manual_seed(0)
    return Layer()


def adapted(side: str, base: nn.Module, folder: Path) -> nn.Module:
    """The base with the adapter in `folder`, to train."""
    if side == "ours":
        return VBLoRAModel.from_pretrained(base, folder, is_trainable=True).train()
    model: nn.Module = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    return model.train()


def median_time(run: Callable[[], object], repeats: int, warm_up: int) -> float:
    """Median seconds of `run`."""
    seconds = []
    for repeat in range(warm_up + repeats):
        began = time.perf_counter()
        run()
        if repeat >= warm_up:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure_layer(side: str, folder: Path) -> dict[str, Any]:
    """(a) and (b), the same of the layer without an adapter, and what the layer answers."""
    generator = torch.Generator().manual_seed(1)
    x, gradient = torch.randn(TOKENS, IN, generator=generator), torch.randn(TOKENS, OUT, generator=generator)
    wanting = x.clone().requires_grad_(True)
    model, base = adapted(side, layer(), folder), layer().requires_grad_(False)
    output = model(x)
    output.backward(gradient)
    banks = [p.grad for p in model.parameters() if p.shape == (SHAPE["num_vectors"], SHAPE["vector_length"])]
    assert banks[0] is not None
    result: dict[str, Any] = {"output": output.norm().item(), "gradient": banks[0].norm().item()}
    result["layer_s"] = median_time(lambda: model(x).backward(gradient), LAYER_REPEATS, WARM_UP)
    result["layer_with_input_gradient_s"] = median_time(
        lambda: model(wanting).backward(gradient), LAYER_REPEATS, WARM_UP
    )
    result["base_layer_s"] = median_time(lambda: base(x), LAYER_REPEATS, WARM_UP)
    result["base_layer_with_input_gradient_s"] = median_time(
        lambda: base(wanting).backward(gradient), LAYER_REPEATS, WARM_UP
    )
    model.eval()
    with torch.no_grad():
        result["token_s"] = median_time(lambda: model(x[:1]), 10 * LAYER_REPEATS, WARM_UP)
        result["base_token_s"] = median_time(lambda: base(x[:1]), 10 * LAYER_REPEATS, WARM_UP)
    return result


def measure_steps(side: str, folder: Path, name: str, steps: int) -> dict[str, Any]:
    """(c) and (d), and the loss of the first step."""
    base = load_base_model(name, dtype="float32")
    model = adapted(side, base.model, folder)
    examples = [encode(row, base.tokenizer, 512) for row in read_rows(ROWS)[: BATCH * 4]]
    options = TrainingOptions(max_steps=steps + 1, batch_size=BATCH)
    trained = model if isinstance(model, VBLoRAModel) else base.model
    loop = TrainingLoop(trained, {"default": examples}, pad_token(base.tokenizer), options)
    losses: list[float] = []
    run = loop.run(steps + 1, losses)
    next(run)
    Path("/proc/self/clear_refs").write_text("5")  # forget the most that was resident so far
    step_s = median_time(lambda: next(run), steps, 0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"loss": losses[0], "step_s": step_s, "peak_bytes": int(status["VmHWM"].split()[0]) * 1024}


def write_adapters(folder: Path, name: str) -> None:
    """The adapters that both sides start from: one of the layer, one of the demo model."""
    torch.manual_seed(0)
    get_vblora_model(layer(), VBLoRAConfig(target_modules=["linear"], **SHAPE)).save_pretrained(folder / "layer")
    base = load_base_model(name, dtype="float32")
    get_vblora_model(base.model, VBLoRAConfig(target_modules="all-linear", **SHAPE)).save_pretrained(folder / "model")


def check_agreement(found: dict[str, list[dict[str, Any]]]) -> None:
    """Exit unless both sides computed the same."""
    for figure, tolerance in AGREEMENT.items():
        mine, theirs = (found[side][0][figure] for side in SIDES)
        if abs(mine - theirs) > tolerance * abs(theirs):
            sys.exit(f"the two sides differ in {figure}: {mine} and {theirs}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="training steps a repeat")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.child:
        result = measure_layer(options.child, options.folder / "layer")
        result |= measure_steps(options.child, options.folder / "model", options.model, options.steps)
        print(json.dumps(result))
        return
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        write_adapters(Path(temporary), options.model)
        for repeat in range(options.repeats):
            for side in SIDES:
                arguments = ("--child", side, "--folder", temporary, "--model", options.model, "--steps", options.steps)
                found[side].append(fresh_process("benchmarks.bench_method", *arguments))
                print(f"{repeat + 1}/{options.repeats} {side}: {found[side][-1]}", flush=True)
    check_agreement(found)
    sides = {side: {figure: [run[figure] for run in runs] for figure in runs[0]} for side, runs in found.items()}
    ratios = {
        figure: statistics.median(sides["peft"][figure]) / statistics.median(sides["ours"][figure])
        for figure in FIGURES
    }
    print(json.dumps({"claim": "method", "ratio": ratios, "sides": sides, "peft": peft.__version__, **machine()}))


if __name__ == "__main__":
    main()
