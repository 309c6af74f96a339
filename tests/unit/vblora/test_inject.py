"""Which modules an adapter targets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support import tiny_model
from vblora import ConfigError, TargetError, VBLoRAConfig, get_vblora_model
from vblora.inject import find_targets


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


@pytest.mark.parametrize(
    "values",
    [
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"task_type": "SEQ_CLS"},
    ],
)
def test_what_is_not_supported_is_said(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        targets(tiny_model(), **values)


def test_conv1d_is_recognised_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out set to True"):
        model = get_vblora_model(tiny_model("gpt2"), VBLoRAConfig(vector_length=16))
    assert model.peft_config["default"].fan_in_fan_out
    a, b = model.layer_adapters("default")["transformer.h.0.attn.c_attn"].matrices()
    assert (a.shape, b.shape) == (torch.Size([4, 64]), torch.Size([192, 4]))
