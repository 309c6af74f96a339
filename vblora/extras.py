"""What an adapter trains besides its deltas: whole modules (`modules_to_save`) and biases, its own copies of each.

Copies stand in the base model's place while their adapter is active, so that any kind of module can be one and the
base model runs as it is. Knows the base model's modules, not which adapter is active.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from vblora.checkpoint import refuse_names
from vblora.config import VBLoRAConfig
from vblora.errors import CheckpointError, TargetError
from vblora.inject import HEADS, base_layer, base_modules, matches, plain_path, quantised_kind, saved_names
from vblora.layer import module_key


class Extras(nn.Module):
    """Copies of modules and biases, by their paths in the base model; `copies` and `biases` may be empty."""

    def __init__(self, copies: Mapping[str, nn.Module], biases: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.paths = tuple(copies)
        self.bias_paths = tuple(biases)
        self.copies = nn.ModuleDict({module_key(path): module for path, module in copies.items()})
        self.biases = nn.ParameterDict({module_key(path): bias for path, bias in biases.items()})
        self._base: tuple[dict[str, nn.Module], dict[str, nn.Parameter]] | None = None  # while installed; a tuple, so
        # that torch does not register what it holds

    @classmethod
    def of(cls, model: nn.Module, config: VBLoRAConfig, targets: Collection[str]) -> Extras:
        """Copies of the base model's own values, as the configuration asks for.

        Raises `TargetError` if a name of `modules_to_save` matches no module (heads of a task type may), or a quantised
        one.
        """
        modules = dict(base_modules(model))
        names = saved_names(config)
        for name in sorted(set(names).difference(*HEADS.values())):
            if not any(matches(plain_path(path), [name], "modules_to_save") for path in modules):
                raise TargetError(f"modules_to_save: the base model has no module named {name!r}")
        found = [path for path in modules if matches(plain_path(path), names, "modules_to_save")]
        outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
        biased = () if config.bias == "none" else targets if config.bias == "vblora_only" else modules
        for path in outer:
            for name, parameter in modules[path].named_parameters():
                if kind := quantised_kind(parameter):
                    raise TargetError(f"modules_to_save: {path}.{name} is quantised ({kind}) and cannot be trained")
        inside = tuple(f"{path}." for path in outer)
        biases = {
            path: nn.Parameter(bias.detach().clone())
            for path in biased
            if isinstance(bias := getattr(modules[path], "bias", None), nn.Parameter)
            and not f"{path}.".startswith(inside)
        }
        return cls({path: copy.deepcopy(modules[path]) for path in outer}, biases)

    @property
    def is_empty(self) -> bool:
        return not self.paths and not self.bias_paths

    def tensors(self) -> dict[str, Tensor]:
        """The values by their names in the base model; the adapter's own tensors, not copies."""
        return {plain_path(name): tensor.detach() for name, tensor in self._named()}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for path in self.paths:
            for name, tensor in self.copies[module_key(path)].state_dict(keep_vars=True).items():
                yield f"{path}.{name}", tensor
        for path in self.bias_paths:
            yield f"{path}.bias", self.biases[module_key(path)]

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over values by their names. Raises `CheckpointError`, before any change, unless names and shapes fit."""
        own = {plain_path(name): tensor for name, tensor in self._named()}
        refuse_names(missing=own.keys() - values.keys(), unexpected=values.keys() - own.keys())
        for name, tensor in own.items():
            if values[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{name}: shape {list(values[name].shape)} in the adapter, {list(tensor.shape)} in the base model"
                )
        for name, tensor in own.items():
            tensor.copy_(values[name])

    def install(self, model: nn.Module) -> None:
        """Put the copies in the place of the base model's own."""
        assert self._base is None
        self._base = (
            {path: model.get_submodule(path) for path in self.paths},
            {path: base_layer(model, path).get_parameter("bias") for path in self.bias_paths},
        )
        self._put(model, dict(zip(self.paths, self.copies.values(), strict=True)), dict(self._biases()))

    def remove(self, model: nn.Module) -> None:
        """Put the base model's own modules and biases back: the same objects."""
        if self._base is not None:
            self._put(model, *self._base)
            self._base = None

    def _biases(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path in self.bias_paths:
            yield path, self.biases[module_key(path)]

    @staticmethod
    def _put(model: nn.Module, modules: Mapping[str, nn.Module], biases: Mapping[str, nn.Parameter]) -> None:
        for path, module in modules.items():
            model.set_submodule(path, module)
        for path, bias in biases.items():
            base_layer(model, path).register_parameter("bias", bias)
