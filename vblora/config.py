"""The hyperparameters of an adapter: data and validation. Knows no model: `inject` checks what depends on one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from vblora.errors import ConfigError, IncompatibleError

PEFT_TYPE = "VBLORA"
Bias = Literal["none", "all", "vblora_only"]
Names = list[str] | str | None

# What describes where an adapter comes from, not what it computes.
BOOKKEEPING = frozenset(
    {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
)


@dataclass
class VBLoRAConfig:
    """Hyperparameters of a VB-LoRA adapter, with the names, defaults and meanings of PEFT's `VBLoRAConfig`.

    Raises `ConfigError` for values that make no sense, `IncompatibleError` for another `peft_type`.

    Args:
        r: rank of the update.
        num_vectors: h, vectors in the bank.
        vector_length: b, length of one; must divide both sizes of every target module.
        topk: k, bank vectors mixed into one sub-vector.
        target_modules: a list of names or suffixes, a regular expression for whole names, ``all-linear`` (all but the
            output layer), or None for the usual ones of the architecture.
        exclude_modules: names, suffixes or a regular expression to leave out.
        save_only_topk_weights: write top-k metadata, for inference only, instead of logits.
        vblora_dropout: probability of dropping an input of the update while training.
        fan_in_fan_out: whether weights are stored (in, out), as in transformers' `Conv1D`; corrected when wrong.
        bias: which biases are trained too: ``none``, ``all`` or ``vblora_only``.
        modules_to_save: modules trained and saved as a whole.
        init_vector_bank_bound: the bank starts uniform between minus and plus this.
        init_logits_std: logits start normal with this standard deviation.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers, for `layers_to_transform`.
        task_type, auto_mapping, peft_version, base_model_name_or_path, revision, inference_mode: PEFT's bookkeeping.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    target_modules: Names = None
    exclude_modules: Names = None
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Bias = "none"
    modules_to_save: list[str] | None = None
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names = None
    task_type: str | None = None
    peft_type: str = PEFT_TYPE
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.peft_type != PEFT_TYPE:
            raise IncompatibleError(f"peft_type must be {PEFT_TYPE!r}, not {self.peft_type!r}", "peft_type")
        for name in ("r", "num_vectors", "vector_length", "topk"):
            _check_count(name, getattr(self, name))
        if self.topk > self.num_vectors:
            raise ConfigError(f"topk is {self.topk}, more than num_vectors, which is {self.num_vectors}")
        for name in ("save_only_topk_weights", "fan_in_fan_out", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name in ("vblora_dropout", "init_vector_bank_bound", "init_logits_std"):
            _check_size(name, getattr(self, name))
        if self.vblora_dropout >= 1:
            raise ConfigError(f"vblora_dropout must be in [0, 1), not {self.vblora_dropout!r}")
        if self.bias not in get_args(Bias):
            raise ConfigError(f"bias must be one of {', '.join(get_args(Bias))}, not {self.bias!r}")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            setattr(self, name, _names(name, getattr(self, name)))
        self._check_modules_and_layers()
        self._check_bookkeeping()

    def _check_modules_and_layers(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise ConfigError("modules_to_save must be a list of names, not one string")
        modules = _names("modules_to_save", self.modules_to_save)
        assert not isinstance(modules, str)
        self.modules_to_save = modules
        layers = self.layers_to_transform
        indices = layers if isinstance(layers, list) else [] if layers is None else [layers]
        if not all(type(index) is int and index >= 0 for index in indices):
            raise ConfigError(f"layers_to_transform must be layer indices from 0, not {layers!r}")
        if self.layers_pattern and layers is None:
            raise ConfigError("layers_pattern needs layers_to_transform")

    def _check_bookkeeping(self) -> None:
        for name in ("task_type", "peft_version", "base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name} must be a string or null, not {getattr(self, name)!r}")
        if not isinstance(self.auto_mapping, dict | None):
            raise ConfigError(f"auto_mapping must be an object or null, not {self.auto_mapping!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> VBLoRAConfig:
        """The configuration in an `adapter_config.json`. Raises `ConfigError` or `IncompatibleError`.

        Unknown entries are left out, as PEFT does: files of later versions carry more bookkeeping. One that changes
        the parametrisation changes the tensors too, and those are checked.
        """
        if "peft_type" not in values:
            raise ConfigError("peft_type is missing")
        known = {field.name for field in fields(cls)}
        arguments: dict[str, Any] = {name: value for name, value in values.items() if name in known}
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """Every field, fit for JSON; lists of names are sorted, because their order means nothing."""
        values = asdict(self)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(values[name], list):
                values[name] = sorted(values[name])
        return values

    def canonical(self) -> dict[str, Any]:
        """What two equal adapters have in common: `to_dict` without bookkeeping."""
        return {name: value for name, value in self.to_dict().items() if name not in BOOKKEEPING}


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value <= 0:
        raise ConfigError(f"{name} must be a positive integer, not {value!r}")


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name} must be a finite number from 0, not {value!r}")


def _names(field: str, value: object) -> Names:
    """Names as given, or as a list where another collection of strings was given."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(name, str) for name in value):
        return list(value)
    raise ConfigError(f"{field} must be a string or a list of strings, not {value!r}")
