"""Whole modules and biases that an adapter trains, and what happens to the base model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from tests.bases import hyperparameters, make_base, outputs
from vblora import (
    CheckpointError,
    ConfigError,
    TargetError,
    VBLoRAConfig,
    VBLoRAModel,
    get_vblora_model,
    read_adapter,
    write_adapter,
)
from vblora.checkpoint import AdapterCheckpoint


def config(base: str = "roberta", **changes: Any) -> VBLoRAConfig:
    return VBLoRAConfig(**hyperparameters(base, **changes))


@torch.no_grad()
def answer(model: nn.Module, base: str = "roberta") -> Tensor:
    return outputs(base, model)


@pytest.fixture
def model() -> VBLoRAModel:
    """Two adapters with heads of their own, changed so that each shows."""
    torch.manual_seed(0)
    adapted = get_vblora_model(make_base("roberta"), config()).eval()
    adapted.add_adapter("b", config(bias="all"))
    with torch.no_grad():
        for name, shift in (("default", 1.0), ("b", 2.0)):
            for tensor in adapted._extras(name).tensors().values():
                tensor += shift
    return adapted


def test_each_adapter_has_a_head_of_its_own(model: VBLoRAModel) -> None:
    alone = answer(make_base("roberta"))
    first = answer(model)
    model.set_adapter("b")
    second = answer(model)
    model.set_adapter("default")
    assert torch.equal(answer(model), first)
    assert len({tuple(found.flatten().tolist()) for found in (alone, first, second)}) == 3
    with model.disable_adapter():
        assert torch.equal(answer(model), alone)
    assert torch.equal(answer(model), first)
    assert torch.equal(answer(model.unload()), alone)


def test_only_the_active_adapters_own_are_trained(model: VBLoRAModel) -> None:
    def trained() -> set[str]:
        return {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}

    heads = {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")}
    own = {name for name in trained() if "adapters" not in name}
    assert own == heads
    model.set_adapter("b")
    biases = {name for name in trained() if name.endswith(".bias") and not name.startswith("classifier")}
    assert len(biases) == sum(name.endswith(".bias") for name, _ in make_base("roberta").named_parameters()) - 2
    model.set_adapter("b", inference_mode=True)
    assert not trained()


def test_two_with_heads_cannot_be_active_at_once(model: VBLoRAModel) -> None:
    before = answer(model)
    with pytest.raises(ConfigError, match="'default' and 'b' have modules_to_save or biases of their own"):
        model.set_adapter(["default", "b"])
    with pytest.raises(ConfigError, match="'default' and 'b'"):
        model.merge_adapter(["default", "b"])
    with pytest.raises(ConfigError, match="adapter_names: 'b' has modules_to_save"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), adapter_names=["b"])
    assert torch.equal(answer(model), before)
    assert model.active_adapters == ["default"]


def test_a_merge_brings_its_head_and_an_unmerge_takes_it_away(model: VBLoRAModel) -> None:
    first = answer(model)
    model.set_adapter("b")
    second = answer(model)
    model.set_adapter("default")
    model.set_adapter("b")
    model.merge_adapter()
    torch.testing.assert_close(answer(model), second, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(answer(model), second)
    model.set_adapter("default")
    assert torch.equal(answer(model), first)
    merged = model.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(answer(merged), second, atol=1e-5, rtol=1e-5)
    assert "adapter" not in " ".join(dict(merged.named_modules()))


def test_deleting_the_active_one_puts_the_base_models_head_back(model: VBLoRAModel) -> None:
    model.delete_adapter("default")
    assert torch.equal(answer(model), answer(make_base("roberta")))


def test_a_new_adapter_starts_from_the_base_models_head(model: VBLoRAModel) -> None:
    model.add_adapter("c", config())
    own = make_base("roberta").state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model._extras("c").tensors().items())


def test_files_hold_what_was_trained(model: VBLoRAModel, tmp_path: Path) -> None:
    model.set_adapter("b")
    wanted = answer(model)
    model.save_pretrained(tmp_path, ["b"])
    fresh = VBLoRAModel.from_pretrained(make_base("roberta"), tmp_path / "b")
    assert torch.equal(answer(fresh), wanted)
    assert fresh.get_nb_savable_parameters() == model.get_nb_savable_parameters("b")
    assert fresh.get_nb_savable_parameters()[1] == sum(t.numel() for t in read_adapter(tmp_path / "b").extras.values())


def test_files_that_lack_a_head_or_bring_another(model: VBLoRAModel, tmp_path: Path) -> None:
    checkpoint = model.checkpoint()
    for number, (change, message) in enumerate(
        (
            ({"classifier.dense.weight": None, "classifier.dense.bias": None},
             r"^classifier.dense.bias, classifier.dense.weight: is missing$"),
            ({"classifier.extra.weight": torch.ones(2)}, "classifier.extra.weight: is not expected here"),
            ({"classifier.dense.bias": torch.ones(2)}, r"classifier.dense.bias: shape \[2\] in the adapter, \[64\]"),
        )
    ):  # fmt: skip
        extras = {name: tensor for name, tensor in {**checkpoint.extras, **change}.items() if tensor is not None}
        changed = AdapterCheckpoint(checkpoint.config, checkpoint.bank, checkpoint.modules, extras)
        write_adapter(tmp_path / str(number), changed)
        base = make_base("roberta")
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            VBLoRAModel.from_pretrained(base, tmp_path / str(number))
        assert base.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_names_that_match_nothing_and_overlaps() -> None:
    with pytest.raises(TargetError, match="modules_to_save: the base model has no module named 'head'"):
        get_vblora_model(make_base("linears"), config("linears", modules_to_save=["head"]))
    model = get_vblora_model(make_base("linears"), config("linears"))
    with pytest.raises(TargetError, match=r"modules_to_save: blocks\.0 holds blocks\.0\.linear, which"):
        model.add_adapter("b", config("linears", target_modules=["first"], modules_to_save=["blocks.0"]))
    assert list(model.peft_config) == ["default"]


def test_the_example_of_the_methods_documentation() -> None:
    """A causal model with SEQ_CLS, as it stands there: no classifier to train, and none is asked for."""
    shape = {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 1, "num_attention_heads": 12}
    base_model = OPTForCausalLM(OPTConfig(vocab_size=64, word_embed_proj_dim=768, max_position_embeddings=32, **shape))
    peft_config = VBLoRAConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        num_vectors=60,
        vector_length=256,
        save_only_topk_weights=True,
    )
    model = get_vblora_model(base_model, peft_config)
    model.print_savable_parameters()
    assert len(model.adapted_layers) == 6
    assert model.get_nb_savable_parameters()[1] == 0
