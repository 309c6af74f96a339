"""A base model whose weights torchao has quantised to int8: adapters train on it, and it serves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from serving.engine import Engine
from serving.types import EngineSettings, GenerationRequest, SamplingParams
from tests.bases import hyperparameters, loss, make_base, outputs
from tests.support import random_adapter, tiny_model, tiny_tokenizer
from vblora import MergeError, TargetError, VBLoRAConfig, VBLoRAModel, get_vblora_model, param_groups, write_adapter
from vblora.integrations.base_models import BaseModel

BASES = ("llama", "gemma3", "opt", "roberta", "linears")


def quantised(model: nn.Module) -> nn.Module:
    """All linears but a classifier, which an adapter trains as a whole."""
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda module, path: isinstance(module, nn.Linear) and "classifier" not in path,
    )
    return model


@pytest.mark.parametrize("base", BASES)
def test_it_trains_saves_and_loads(base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = hyperparameters(base)
    model = get_vblora_model(quantised(make_base(base)), VBLoRAConfig(**values))
    adapted = next(iter(model.adapted_layers.values()))
    assert type(adapted.weight).__name__ == "Int8Tensor"
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 1e-2))
    losses = []
    for _ in range(5):
        value = loss(base, model)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    again = VBLoRAModel.from_pretrained(quantised(make_base(base)), tmp_path)
    with torch.no_grad():
        assert torch.equal(outputs(base, again), outputs(base, model))


@torch.no_grad()
def test_a_single_row_gives_what_it_gives_among_others() -> None:
    """As in generating: a row on its own takes another path where the weights are plain."""
    torch.manual_seed(0)
    base = quantised(nn.Sequential(nn.Linear(32, 48)))
    model = get_vblora_model(base, VBLoRAConfig(r=4, num_vectors=12, vector_length=16, target_modules=["0"])).eval()
    x = torch.randn(3, 32)
    assert torch.allclose(torch.cat([model(row[None]) for row in x]), model(x), atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_merging_is_refused_and_changes_nothing(base: str) -> None:
    torch.manual_seed(0)
    model = get_vblora_model(quantised(make_base(base)), VBLoRAConfig(**hyperparameters(base))).eval()
    with torch.no_grad():
        before = outputs(base, model)
        with pytest.raises(MergeError, match=r"the weight of .* is quantised \(Int8Tensor\)"):
            model.merge_adapter()
        assert torch.equal(outputs(base, model), before)
    assert isinstance(model.unload(), nn.Module)


def test_a_quantised_module_cannot_be_trained_as_a_whole() -> None:
    model = make_base("roberta")
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(TargetError, match=r"modules_to_save: classifier\.dense\.weight is quantised \(Int8Tensor\)"):
        get_vblora_model(model, VBLoRAConfig(**hyperparameters("roberta")))


def test_it_serves_adapters(tmp_path: Path) -> None:
    """Greedy, a request without an adapter and one with: the tokens of the reference on the same quantised model."""
    checkpoint = random_adapter(tiny_model(), seed=1)
    write_adapter(tmp_path, checkpoint)
    prompt = tiny_tokenizer().encode("the quick brown fox")
    base = tiny_model()
    quantised(base)
    settings = EngineSettings(model="tiny", max_batch_size=4, max_batched_tokens=64, kv_cache_bytes=1 << 22)
    engine = Engine(BaseModel("tiny", base, tiny_tokenizer()), settings)
    engine.start()
    try:
        revision = engine.load_adapter(checkpoint)
        sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        answers = engine.generate(
            [GenerationRequest(str(name), "default", tuple(prompt), sampling, name) for name in (None, revision)]
        )
    finally:
        engine.close()
    alone = tiny_model()
    quantised(alone)
    adapted = VBLoRAModel.from_pretrained(alone, tmp_path)
    for answer, names in zip(answers, (["__base__"], ["default"]), strict=True):
        tokens = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                logits = adapted(input_ids=torch.tensor([tokens]), adapter_names=names).logits
            tokens.append(int(logits[0, -1].argmax()))
        assert list(answer.token_ids) == tokens[len(prompt) :]
    assert answers[0].token_ids != answers[1].token_ids
