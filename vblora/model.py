"""`VBLoRAModel`: a base model with named adapters, trained, switched, merged and saved one by one.

Knows which adapter is where and what is active; the maths is in `layer`, the files in `checkpoint`. Works for any
`nn.Module`: nothing here is particular to transformers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vblora.bank import VectorBank
from vblora.build import check_bank, device_of, loaded_adapters, random_adapters, random_bank, settled
from vblora.checkpoint import AdapterCheckpoint, read_adapter, write_adapter
from vblora.config import VBLoRAConfig
from vblora.errors import AdapterNameError, CheckpointError, ConfigError
from vblora.inject import check_modules, check_supported, find_targets, unwrap, wrap
from vblora.layer import AdaptedLinear, LayerAdapter, LogitsAdapter, module_key
from vblora.merge import merge, unmerge
from vblora.parameters import savable_parameters

DEFAULT_NAME = "default"


class VBLoRAModel(nn.Module):
    """Wraps `model` in place, freezes it, and adds a first, active adapter.

    Attribute access, `forward` and `generate` go to the base model. Adapter parameters are float32 on any base.

    Args:
        model: the base model.
        config: hyperparameters of the first adapter; it is copied.
        adapter_name: any name that can be a folder's, dots included.
        low_cpu_mem_usage: make the adapter's tensors on torch's meta device, to be given values with
            `load_state_dict(…, assign=True)`.
        bank: a bank to share instead of a new one.
        freeze_bank: never train the bank, only the logits.

    Raises `ConfigError`, `TargetError`, `AdapterNameError`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: VBLoRAConfig,
        adapter_name: str = DEFAULT_NAME,
        low_cpu_mem_usage: bool = False,
        *,
        bank: VectorBank | None = None,
        freeze_bank: bool = False,
    ) -> None:
        self._set_up(model)
        self.add_adapter(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage, bank=bank, freeze_bank=freeze_bank)
        self.set_adapter(adapter_name)

    def _set_up(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.banks = nn.ModuleDict()
        self.peft_config: dict[str, VBLoRAConfig] = {}
        self.layers: dict[str, AdaptedLinear] = {}
        self._active: list[str] = []
        self._merged: list[str] = []
        model.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        path: str | os.PathLike[str],
        adapter_name: str = DEFAULT_NAME,
        is_trainable: bool = False,
    ) -> VBLoRAModel:
        """Wrap `model` with the adapter in the folder `path`, active; in eval mode unless `is_trainable`.

        Raises `CheckpointError`, a top-k-only file with `is_trainable` included, `TargetError` and `ConfigError`.
        """
        adapted = cls.__new__(cls)
        adapted._set_up(model)
        adapted.load_adapter(path, adapter_name, is_trainable=is_trainable)
        adapted.set_adapter(adapter_name, inference_mode=not is_trainable)
        return adapted if is_trainable else adapted.eval()

    def add_adapter(
        self,
        adapter_name: str,
        config: VBLoRAConfig,
        *,
        low_cpu_mem_usage: bool = False,
        bank: VectorBank | None = None,
        freeze_bank: bool = False,
    ) -> None:
        """Add a randomly initialised adapter, inactive. Raises `AdapterNameError`, `ConfigError`, `TargetError`."""
        self._check_new_name(adapter_name)
        shapes = find_targets(self.model, config)
        device = torch.device("meta") if low_cpu_mem_usage else None
        if bank is None:
            bank = random_bank(config, device or device_of(self.model, next(iter(shapes))))
        check_bank(config, bank)
        bank.frozen = bank.frozen or freeze_bank
        adapters = random_adapters(self.model, config, shapes, bank, device)
        self._add(adapter_name, settled(self.model, config, shapes), bank, adapters)

    def load_adapter(self, path: str | os.PathLike[str], adapter_name: str, *, is_trainable: bool = False) -> None:
        """Add the adapter in the folder `path`, inactive. Top-k-only files stay sparse in memory.

        Raises `CheckpointError` if the files are bad, lack a targeted module, or are top-k only with `is_trainable`;
        `TargetError` if the base model does not fit, `ConfigError` for what is not supported, `AdapterNameError`.
        """
        self._check_new_name(adapter_name)
        checkpoint = read_adapter(path)
        config = replace(checkpoint.config, inference_mode=not is_trainable)
        check_supported(config)
        if is_trainable and not checkpoint.trainable:
            raise CheckpointError("a top-k-only adapter has no logits and cannot be trained: load a full one")
        shapes = find_targets(self.model, config)
        check_modules(checkpoint, shapes)
        bank = VectorBank(checkpoint.bank).to(device_of(self.model, next(iter(shapes))))
        adapters = loaded_adapters(self.model, checkpoint, bank)
        self._add(adapter_name, settled(self.model, config, shapes), bank, adapters)

    def _add(self, name: str, config: VBLoRAConfig, bank: VectorBank, adapters: dict[str, LayerAdapter]) -> None:
        self.peft_config[name] = config
        self.banks[module_key(name)] = bank
        for path, adapter in adapters.items():
            layer = self.layers[path] = wrap(self.model, path)
            layer.adapters[module_key(name)] = adapter.train(layer.training)
            layer.active = list(self._active)
        self._update_requires_grad()

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

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that add to the base model's output."""
        return list(self._active)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate these adapters and no others; only theirs train, and none in `inference_mode`.

        Merged adapters are unmerged first, with a warning. Raises `AdapterNameError`.
        """
        names = self._known(adapter_name)
        if self._merged:
            warnings.warn("adapters were merged: unmerging them before the switch", stacklevel=2)
            self.unmerge_adapter()
        for name in names:
            self.peft_config[name].inference_mode = inference_mode
        self._active = names
        for layer in self.layers.values():
            layer.active = list(names)
        self._update_requires_grad()

    def _update_requires_grad(self) -> None:
        trained = [name for name in self._active if not self.peft_config[name].inference_mode]
        for name in self.peft_config:
            for adapter in self.layer_adapters(name).values():
                adapter.requires_grad_(name in trained)
        self.banks.requires_grad_(False)
        for name in trained:
            bank = self.bank(name)
            has_logits = any(isinstance(adapter, LogitsAdapter) for adapter in self.layer_adapters(name).values())
            bank.requires_grad_(bank.vectors.requires_grad or (has_logits and not bank.frozen))

    def bank(self, adapter_name: str = DEFAULT_NAME) -> VectorBank:
        """The bank of an adapter. Raises `AdapterNameError`."""
        bank = self.banks[module_key(self._known(adapter_name)[0])]
        assert isinstance(bank, VectorBank)
        return bank

    def layer_adapters(self, adapter_name: str) -> dict[str, LayerAdapter]:
        """The shares of an adapter in the layers that it targets, by path."""
        found = {path: layer.adapter(adapter_name) for path, layer in self.layers.items()}
        return {path: adapter for path, adapter in found.items() if adapter is not None}

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its bank; if it was the active one, none is active afterwards.

        Raises `AdapterNameError` if it is unknown or merged.
        """
        self._known(adapter_name)
        if adapter_name in self._merged:
            raise AdapterNameError(f"adapter {adapter_name!r} is merged: unmerge it before deleting it")
        for layer in self.layers.values():
            if layer.adapter(adapter_name) is not None:
                del layer.adapters[module_key(adapter_name)]
        del self.banks[module_key(adapter_name)]
        del self.peft_config[adapter_name]
        self._active = [name for name in self._active if name != adapter_name]
        for layer in self.layers.values():
            layer.active = list(self._active)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the base model answers alone, merged adapters included."""
        merged = list(self._merged)
        self._set_enabled(False)
        if merged:
            self.unmerge_adapter()
        try:
            yield
        finally:
            self._set_enabled(True)
            if merged:
                self.merge_adapter(merged)

    def _set_enabled(self, enabled: bool) -> None:
        for layer in self.layers.values():
            layer.enabled = enabled

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters, by default the active ones, into the base weights, beside those that are merged already.

        Raises `AdapterNameError` for a plain string or an unknown name, `MergeError` as `merge_and_unload` does.
        """
        self._merge(adapter_names, safe_merge, progressbar=False)

    def _merge(self, adapter_names: Sequence[str] | None, safe_merge: bool, progressbar: bool) -> None:
        if isinstance(adapter_names, str):
            raise AdapterNameError(f"adapter_names must be a list of names, not the string {adapter_names!r}")
        wanted = self._known(self._active if adapter_names is None else adapter_names)
        names = list(dict.fromkeys([*self._merged, *wanted]))
        merge(self.layers, names, safe=safe_merge, progress=progressbar)
        self._merged = names

    def unmerge_adapter(self) -> None:
        """Put the base model's own weights back, bit for bit."""
        if not self._merged:
            warnings.warn("nothing is merged", stacklevel=2)
        unmerge(self.layers)
        self._merged = []

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Fold adapters, by default the active ones, into the base model for good, and return it.

        With `safe_merge`, raises `MergeError` before anything is changed if a weight would not be finite;
        `AdapterNameError` for a plain string or an unknown name.
        """
        self._merge(adapter_names, safe_merge, progressbar)
        return self._unwrapped()

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters."""
        unmerge(self.layers)
        return self._unwrapped()

    def _unwrapped(self) -> nn.Module:
        for path in self.layers:
            unwrap(self.model, path)
        self.layers, self.peft_config, self.banks = {}, {}, nn.ModuleDict()
        self._active, self._merged = [], []
        return self.model

    def checkpoint(self, adapter_name: str = DEFAULT_NAME) -> AdapterCheckpoint:
        """An adapter as it would be saved; its tensors are the model's own, not copies."""
        bank = self.bank(adapter_name).vectors.detach()
        modules = {path: adapter.content for path, adapter in self.layer_adapters(adapter_name).items()}
        return AdapterCheckpoint(self.peft_config[adapter_name], bank, modules, {})

    def save_pretrained(
        self, directory: str | os.PathLike[str], selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Write adapters, by default all: "default" into `directory`, others into folders of their names there.

        Raises `AdapterNameError` for an unknown name.
        """
        for name in self._known(list(self.peft_config) if selected_adapters is None else selected_adapters):
            folder = Path(directory) if name == DEFAULT_NAME else Path(directory) / name
            write_adapter(folder, self.checkpoint(name))

    def get_nb_savable_parameters(self, adapter: str = DEFAULT_NAME) -> tuple[int, int]:
        """(VB-LoRA's, others') parameters in the file of one adapter, in float32 equivalents."""
        return savable_parameters(self.checkpoint(adapter))

    def print_savable_parameters(self) -> None:
        """Print what saving the active adapters would write."""
        counts = [self.get_nb_savable_parameters(name) for name in self._active]
        own, others = sum(count[0] for count in counts), sum(count[1] for count in counts)
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with the active adapters. Raises `ConfigError` for `adapter_names`."""
        return self.model(*args, **_without_adapter_names(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with the active adapters. Raises `ConfigError` for `adapter_names`."""
        generate: Any = self.model.generate
        return generate(*args, **_without_adapter_names(kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def get_vblora_model(
    model: nn.Module,
    config: VBLoRAConfig,
    adapter_name: str = DEFAULT_NAME,
    *,
    bank: VectorBank | None = None,
    freeze_bank: bool = False,
) -> VBLoRAModel:
    """Wrap `model` with a new adapter; arguments and errors are `VBLoRAModel`'s."""
    return VBLoRAModel(model, config, adapter_name, bank=bank, freeze_bank=freeze_bank)


def _without_adapter_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("adapter_names") is not None:
        raise ConfigError("adapter_names: rows with different adapters are not supported here; use AdapterSlots")
    return {name: value for name, value in kwargs.items() if name != "adapter_names"}
