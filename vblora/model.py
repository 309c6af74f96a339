"""`VBLoRAModel`: a base model with named adapters, trained, switched, merged and saved one by one.

Knows which adapter is where and what is active; the maths is in `layer`, the files in `checkpoint`. Works for any
`nn.Module`: nothing here is particular to transformers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vblora.bank import VectorBank
from vblora.build import check_bank, device_of, loaded_adapters, random_adapters, random_bank, settled
from vblora.checkpoint import AdapterCheckpoint, read_adapter, write_adapter
from vblora.config import VBLoRAConfig
from vblora.contexts import check_rows, composed, each_row
from vblora.errors import AdapterNameError, CheckpointError, ConfigError
from vblora.extras import Extras
from vblora.inject import check_modules, find_targets, plain_path
from vblora.layer import BASE_ROWS
from vblora.merge import merge, unmerge
from vblora.parameters import savable_parameters
from vblora.registry import DEFAULT_NAME, AdapterRegistry


class VBLoRAModel(AdapterRegistry):
    """Wraps `model` in place, freezes it, and adds a first, active adapter.

    Attribute access, `forward` and `generate` go to the base model. Logits and banks are float32 on any base; modules
    to save and biases keep the base's dtype, and only one active adapter may have any.

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
        super().__init__(model)
        self.add_adapter(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage, bank=bank, freeze_bank=freeze_bank)
        self.set_adapter(adapter_name)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        path: str | os.PathLike[str],
        adapter_name: str = DEFAULT_NAME,
        is_trainable: bool = False,
        *,
        freeze_bank: bool = False,
    ) -> VBLoRAModel:
        """Wrap `model` with the adapter in the folder `path`, active; in eval mode unless `is_trainable`.

        Raises `CheckpointError`, a top-k-only file with `is_trainable` included, `TargetError` and `ConfigError`.
        """
        adapted = cls.__new__(cls)
        AdapterRegistry.__init__(adapted, model)
        adapted.load_adapter(path, adapter_name, is_trainable=is_trainable, freeze_bank=freeze_bank)
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
        with self._without_extras():
            extras = Extras.of(self.model, config, shapes).to(device)
        adapters = random_adapters(self.model, config, shapes, bank, device)
        self._add(adapter_name, settled(self.model, config, shapes), bank, adapters, extras)

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        adapter_name: str,
        *,
        is_trainable: bool = False,
        freeze_bank: bool = False,
    ) -> None:
        """Add the adapter in the folder `path`, inactive. Top-k-only files stay sparse in memory.

        A bank that another adapter of this model holds already, bit for bit, is kept once until one of them is trained.
        Raises `CheckpointError` if the files are bad, lack a targeted module, or are top-k only with `is_trainable`;
        `TargetError` or `ConfigError` if the base model does not fit, `AdapterNameError`.
        """
        self._check_new_name(adapter_name)
        checkpoint = read_adapter(path)
        config = replace(checkpoint.config, inference_mode=not is_trainable)
        if is_trainable and not checkpoint.trainable:
            raise CheckpointError("a top-k-only adapter has no logits and cannot be trained: load a full one")
        shapes = find_targets(self.model, config)
        check_modules(checkpoint, shapes)
        with self._without_extras():
            extras = Extras.of(self.model, config, shapes)
        extras.load(checkpoint.extras)
        bank = VectorBank(checkpoint.bank, frozen=freeze_bank).to(device_of(self.model, next(iter(shapes))))
        equal = self._equal_bank(bank)
        adapters = loaded_adapters(self.model, checkpoint, shapes, equal or bank)
        self._add(adapter_name, settled(self.model, config, shapes), equal or bank, adapters, extras)
        if equal:
            self._lent.add(adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate these adapters and no others; only theirs train, and none in `inference_mode`.

        Merged adapters are unmerged first, with a warning. Raises `AdapterNameError`.
        """
        names = self._known(adapter_name)
        extras = self._extras_of(names)
        if self._merged:
            warnings.warn("adapters were merged: unmerging them before the switch", stacklevel=2)
            self.unmerge_adapter()
        for name in names:
            self.peft_config[name].inference_mode = inference_mode
        self._activate(names)
        self._install(extras)
        self._update_requires_grad()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its bank; if it was the active one, none is active afterwards.

        Raises `AdapterNameError` if it is unknown or merged.
        """
        self._known(adapter_name)
        if adapter_name in self._merged:
            raise AdapterNameError(f"adapter {adapter_name!r} is merged: unmerge it before deleting it")
        self._remove(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the base model answers alone, merged adapters included."""
        merged = list(self._merged)
        self._set_enabled(False)
        if merged:
            self.unmerge_adapter()
        try:
            with self._without_extras():
                yield
        finally:
            self._set_enabled(True)
            if merged:
                self.merge_adapter(merged)

    @contextmanager
    def composed(self) -> Iterator[None]:
        """Within this context the active adapters are composed once, for all layers in one operation.

        For one step of training, its backward included: the gradients are the same, and less is spent on each layer.
        """
        with composed([adapter for name in self._active for adapter in self.layer_adapters(name).values()]):
            yield

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
        extras = self._extras_of(names)
        merge(self.adapted_layers, names, safe=safe_merge, progress=progressbar)
        self._install(extras)
        self._merged = names

    def unmerge_adapter(self) -> None:
        """Put the base model's own weights back, bit for bit."""
        if not self._merged:
            warnings.warn("nothing is merged", stacklevel=2)
        unmerge(self.adapted_layers)
        self._install(self._extras_of(self._active))
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
        """The base model as it was, without adapters: the same module objects in the same places."""
        unmerge(self.adapted_layers)
        self._install([])
        return self._unwrapped()

    def checkpoint(self, adapter_name: str = DEFAULT_NAME) -> AdapterCheckpoint:
        """An adapter as it would be saved; its tensors are the model's own, not copies."""
        bank = self.bank(adapter_name).vectors.detach()
        modules = {plain_path(path): adapter.content for path, adapter in self.layer_adapters(adapter_name).items()}
        return AdapterCheckpoint(self.peft_config[adapter_name], bank, modules, self._extras(adapter_name).tensors())

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

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward, with the active adapters, or with one for each row of the batch.

        In `adapter_names` ``__base__`` stands for no adapter. Raises `AdapterNameError` for an unknown name;
        `ConfigError` if the names are not as many as the rows, while adapters are merged, and for adapters with
        modules_to_save or biases, of which a forward has only one.
        """
        model: Any = self._modules["model"]  # as an attribute it would take microseconds to find
        if adapter_names is None:
            return model(*args, **kwargs)
        with self._rows(adapter_names, args, kwargs):
            return model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`; `adapter_names` and errors are `forward`'s."""
        generate: Any = self.model.generate
        if adapter_names is None:
            return generate(*args, **kwargs)
        with self._rows(adapter_names, args, kwargs):
            return generate(*args, **kwargs)

    def _rows(
        self, names: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object]
    ) -> AbstractContextManager[None]:
        if isinstance(names, str):
            raise AdapterNameError(f"adapter_names must be a list of names, not the string {names!r}")
        used = self._known([name for name in names if name != BASE_ROWS])
        if self._merged:
            raise ConfigError("adapter_names: adapters are merged, and would add to every row; unmerge them first")
        if own := [name for name in used if not self._extras(name).is_empty]:
            raise ConfigError(f"adapter_names: {own[0]!r} has modules_to_save or biases, which no single row can have")
        check_rows(names, [*args, *kwargs.values()])
        return each_row(self.adapted_layers.values(), names)

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
