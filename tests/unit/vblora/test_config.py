"""The hyperparameters: defaults, what is refused, what survives JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import peft
import pytest

from vblora import ConfigError, IncompatibleError, VBLoRAConfig


def test_defaults_are_those_of_peft() -> None:
    theirs = peft.VBLoRAConfig().to_dict()
    for name, value in VBLoRAConfig().to_dict().items():
        assert name == "peft_version" or value == theirs[name], name


@pytest.mark.parametrize(
    "values",
    [
        {"r": 0},
        {"r": True},
        {"r": 4.0},
        {"topk": 0},
        {"topk": 3, "num_vectors": 2},
        {"num_vectors": -1},
        {"vector_length": 0},
        {"vblora_dropout": 1.0},
        {"vblora_dropout": -0.1},
        {"vblora_dropout": math.nan},
        {"init_logits_std": -1.0},
        {"init_vector_bank_bound": math.inf},
        {"bias": "some"},
        {"target_modules": 3},
        {"target_modules": ["a", 3]},
        {"modules_to_save": "classifier"},
        {"layers_pattern": "h"},
        {"layers_to_transform": [-1]},
        {"save_only_topk_weights": 1},
        {"base_model_name_or_path": 7},
        {"auto_mapping": "x"},
    ],
)
def test_nonsense_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        VBLoRAConfig(**values)


def test_another_kind_of_adapter_names_the_field() -> None:
    with pytest.raises(IncompatibleError) as caught:
        VBLoRAConfig.from_dict({"peft_type": "LORA"})
    assert caught.value.field == "peft_type"
    with pytest.raises(ConfigError, match="peft_type"):
        VBLoRAConfig.from_dict({})


def test_round_trip_through_json_sorts_names_and_drops_what_is_unknown() -> None:
    config = VBLoRAConfig(target_modules=["v", "q"], layers_to_transform=[1], layers_pattern="h")
    values = json.loads(json.dumps(config.to_dict()))
    assert values["target_modules"] == ["q", "v"]
    again = VBLoRAConfig.from_dict({**values, "a_field_of_the_future": None})
    assert again.to_dict() == config.to_dict()


def test_canonical_leaves_bookkeeping_out() -> None:
    assert VBLoRAConfig(peft_version="1", revision="x").canonical() == VBLoRAConfig(inference_mode=True).canonical()
    assert VBLoRAConfig(r=8).canonical() != VBLoRAConfig().canonical()
