"""Which adapters a base model has, where their parts are, which are active and which of them train.

Knows modules and names; reads no files and merges nothing: that is `model`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vblora.bank import VectorBank
from vblora.config import VBLoRAConfig
from vblora.errors import AdapterNameError, ConfigError, TargetError
from vblora.extras import Extras
from vblora.inject import unwrap, wrap
from vblora.layer import AdaptedLinear, LayerAdapter, LogitsAdapter, module_key

DEFAULT_NAME = "default"


class AdapterRegistry(nn.Module):
    """A frozen base model, wrapped in place, and the adapters on it by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._clear()
        model.requires_grad_(False)

    def _clear(self) -> None:
        self.banks = nn.ModuleDict()
        self.extras = nn.ModuleDict()
        self.peft_config: dict[str, VBLoRAConfig] = {}
        self.adapted_layers: dict[str, AdaptedLinear] = {}
        self._active: list[str] = []
        self._merged: list[str] = []
        self._installed: tuple[Extras, ...] = ()  # a tuple: torch must not register what it holds
        self._lent: set[str] = set()  # adapters that were given an equal bank that was there already

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that add to the base model's output."""
        return list(self._active)

    def bank(self, adapter_name: str = DEFAULT_NAME) -> VectorBank:
        """The bank of an adapter. Raises `AdapterNameError`."""
        bank = self.banks[module_key(self._known(adapter_name)[0])]
        assert isinstance(bank, VectorBank)
        return bank

    def layer_adapters(self, adapter_name: str) -> dict[str, LayerAdapter]:
        """The shares of an adapter in the layers that it targets, by path."""
        found = {path: layer.adapter(adapter_name) for path, layer in self.adapted_layers.items()}
        return {path: adapter for path, adapter in found.items() if adapter is not None}

    def _equal_bank(self, bank: VectorBank) -> VectorBank | None:
        """A bank of this model with the same vectors on the same device, and as frozen."""
        for other in map(self.bank, self.peft_config):
            same_place = other.vectors.device == bank.vectors.device and other.frozen == bank.frozen
            if same_place and torch.equal(other.vectors, bank.vectors):
                return other
        return None

    def _add(
        self,
        name: str,
        config: VBLoRAConfig,
        bank: VectorBank,
        adapters: Mapping[str, LayerAdapter],
        extras: Extras,
    ) -> None:
        self._check_overlap([*self.adapted_layers, *adapters], extras)
        self.peft_config[name] = config
        self.banks[module_key(name)] = bank
        self.extras[module_key(name)] = extras.train(self.model.training)
        for path, adapter in adapters.items():
            layer = self.adapted_layers[path] = wrap(self.model, path)
            layer.add(name, adapter)
            layer.active = list(self._active)
        self._update_requires_grad()

    def _check_overlap(self, targets: Sequence[str], extras: Extras) -> None:
        """A module cannot be adapted in one adapter and replaced as a whole by another."""
        for saved in (path for held in [extras, *map(self._extras, self.peft_config)] for path in held.paths):
            for target in targets:
                if f"{target}.".startswith(f"{saved}."):
                    raise TargetError(f"modules_to_save: {saved} holds {target}, which another adapter targets")

    def _remove(self, name: str) -> None:
        remaining = [other for other in self._active if other != name]
        self._install(self._extras_of(remaining))
        for layer in self.adapted_layers.values():
            layer.remove(name)
        self._activate(remaining)
        self._lent.discard(name)
        del self.banks[module_key(name)], self.extras[module_key(name)], self.peft_config[name]

    def _check_new_name(self, name: str) -> None:
        if not name or name in (".", "..") or any(character in name for character in "/\\\0"):
            raise AdapterNameError(f"{name!r} cannot name an adapter: it could not name a folder")
        if name in self.peft_config:
            raise AdapterNameError(f"an adapter named {name!r} exists already")

    def _known(self, names: str | Sequence[str]) -> list[str]:
        listed = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        for name in listed:
            if name not in self.peft_config:
                raise AdapterNameError(f"no adapter named {name!r}; there are {', '.join(self.peft_config) or 'none'}")
        return listed

    def _activate(self, names: list[str]) -> None:
        self._active = names
        for layer in self.adapted_layers.values():
            layer.active = list(names)

    def _extras(self, name: str) -> Extras:
        extras = self.extras[module_key(name)]
        assert isinstance(extras, Extras)
        return extras

    def _extras_of(self, names: Sequence[str]) -> list[Extras]:
        """The extras to stand in the base model while these adapters are active: at most one adapter's."""
        owners = [name for name in names if not self._extras(name).is_empty]
        if len(owners) > 1:
            raise ConfigError(
                f"{' and '.join(map(repr, owners))} have modules_to_save or biases of their own: activate one of them"
            )
        return [self._extras(name) for name in owners]

    def _install(self, extras: Sequence[Extras]) -> None:
        for installed in self._installed:
            installed.remove(self.model)
        for wanted in extras:
            wanted.install(self.model)
        self._installed = tuple(extras)

    @contextmanager
    def _without_extras(self) -> Iterator[None]:
        """Within this context every module and bias in the base model is its own."""
        installed = self._installed
        self._install([])
        try:
            yield
        finally:
            self._install(installed)

    def _update_requires_grad(self) -> None:
        trained = [name for name in self._active if not self.peft_config[name].inference_mode]
        banks = [self.bank(name) for name in trained if self._mixes(name)]
        self._separate(banks)
        self.banks.requires_grad_(False)
        for name in self.peft_config:
            for adapter in self.layer_adapters(name).values():
                adapter.requires_grad_(name in trained)
            self._extras(name).requires_grad_(name in trained)
        for bank in (self.bank(name) for name in trained if self._mixes(name)):
            bank.requires_grad_(not bank.frozen)

    def _mixes(self, name: str) -> bool:
        """Whether an adapter has logits: top-k metadata cannot be trained."""
        return any(isinstance(adapter, LogitsAdapter) for adapter in self.layer_adapters(name).values())

    def _separate(self, trained: Sequence[VectorBank]) -> None:
        """Before a bank is trained, adapters that were only lent it get a copy of their own."""
        for name in sorted(self._lent):
            bank = self.bank(name)
            if not bank.frozen and any(bank is other for other in trained):
                own = self.banks[module_key(name)] = VectorBank(bank.vectors.clone())
                for adapter in self.layer_adapters(name).values():
                    adapter.use_bank(own)
                self._lent.discard(name)

    def _set_enabled(self, enabled: bool) -> None:
        for layer in self.adapted_layers.values():
            layer.enabled = enabled

    def _unwrapped(self) -> nn.Module:
        for path in self.adapted_layers:
            unwrap(self.model, path)
        self._clear()
        return self.model
