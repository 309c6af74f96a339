"""Which modules an adapter targets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.utils import constants as peft_constants
from torch import nn

from tests.support import tiny_model
from vblora import ConfigError, TargetError, VBLoRAConfig, get_vblora_model
from vblora.inject import DEFAULT_TARGETS, find_targets


def targets(model: nn.Module, **values: Any) -> set[str]:
    return set(find_targets(model, VBLoRAConfig(vector_length=16, **values)))


def suffixes(names: set[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_lists_patterns_and_exclusions() -> None:
    model = tiny_model()
    assert len(targets(model, target_modules=["q_proj", "layers.1.mlp.up_proj"])) == 3
    assert targets(model, target_modules=r".*layers\.0\..*k_proj") == {"model.layers.0.self_attn.k_proj"}
    with pytest.raises(TargetError, match="matches 'k_proj'"):
        targets(model, target_modules="k_proj")
    assert targets(model, target_modules=["q_proj"], exclude_modules=r".*\.0\..*") == {
        "model.layers.1.self_attn.q_proj"
    }
    assert not targets(model, target_modules="all-linear", exclude_modules=["down_proj"]) & {"down_proj"}


def test_all_linear_is_all_but_the_head() -> None:
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert suffixes(targets(tiny_model(), target_modules="all-linear")) == names
    assert suffixes(targets(tiny_model("gpt2"), target_modules="all-linear")) == {"c_attn", "c_proj", "c_fc"}


def test_defaults_by_architecture() -> None:
    assert suffixes(targets(tiny_model("gemma3"))) == {"q_proj", "v_proj"}
    assert suffixes(targets(tiny_model("gpt2"))) == {"c_attn"}
    with pytest.raises(ConfigError, match="target_modules must be given"):
        targets(nn.Sequential(nn.Linear(16, 16)))


def test_defaults_are_those_of_peft_and_more() -> None:
    theirs = peft_constants.TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING
    assert {name: DEFAULT_TARGETS[name] for name in theirs} == theirs
    assert DEFAULT_TARGETS.keys() > theirs.keys()


def test_a_second_adapter_sees_the_base_modules() -> None:
    config = VBLoRAConfig(vector_length=16, target_modules="all-linear")
    model = get_vblora_model(tiny_model(), config)
    model.add_adapter("b", config)
    assert model.layer_adapters("b").keys() == model.layer_adapters("default").keys()
    assert model.peft_config["b"].target_modules == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


def test_targets_are_saved_by_path_where_the_last_part_says_too_much() -> None:
    config = VBLoRAConfig(vector_length=16, target_modules=r".*layers\.0\..*k_proj")
    assert get_vblora_model(tiny_model(), config).peft_config["default"].target_modules == [
        "model.layers.0.self_attn.k_proj"
    ]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(TargetError, match=r"self_attn is a LlamaAttention, not a torch.nn.Linear"):
        targets(tiny_model(), target_modules=["self_attn"])
    with pytest.raises(TargetError, match=r"vector_length 48 .* model.layers.0.*q_proj \(in 64, out 64\).*: 1, 2, 4,"):
        find_targets(tiny_model(), VBLoRAConfig(vector_length=48, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="target_modules: '\\[' is not a regular expression"):
        targets(tiny_model(), target_modules="[")


def test_layers_to_transform() -> None:
    model = tiny_model(num_hidden_layers=3)
    for layers in ([1], 1):
        assert targets(model, target_modules="all-linear", layers_to_transform=layers) == {
            name for name in targets(model, target_modules="all-linear") if ".1." in name
        }
    chosen = targets(model, target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers")
    assert chosen == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 2)}
    # A module that is named in full needs to be in no layer.
    named = "model.layers.2.self_attn.v_proj"
    exact = targets(model, target_modules=["q_proj", named], layers_to_transform=[0])
    assert exact == {"model.layers.0.self_attn.q_proj", named}
    assert targets(model, target_modules=["q_proj"], layers_to_transform=[]) == targets(
        model, target_modules=["q_proj"]
    )
    for layers, pattern in ([0, 7], None), ([0], "blocks"):
        with pytest.raises(TargetError, match="layers_to_transform: no target lies in layer"):
            targets(model, target_modules=["q_proj"], layers_to_transform=layers, layers_pattern=pattern)
    with pytest.raises(ConfigError, match="needs target_modules to be a list"):
        targets(model, target_modules=".*q_proj", layers_to_transform=[0])
    with pytest.raises(ConfigError, match="layers_pattern: '\\['"):
        targets(model, target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["["])


def test_a_module_saved_as_a_whole_is_no_target() -> None:
    names = targets(tiny_model(), target_modules="all-linear", modules_to_save=["mlp"])
    assert suffixes(names) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_conv1d_is_recognised_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out set to True"):
        model = get_vblora_model(tiny_model("gpt2"), VBLoRAConfig(vector_length=16))
    assert model.peft_config["default"].fan_in_fan_out
    a, b = model.layer_adapters("default")["transformer.h.0.attn.c_attn"].matrices()
    assert (a.shape, b.shape) == (torch.Size([4, 64]), torch.Size([4, 192]))
