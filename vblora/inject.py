"""Find the linear layers that an adapter targets, check that they fit, wrap and unwrap them.

Knows names and shapes of modules; draws no weights and reads no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from vblora.checkpoint import AdapterCheckpoint
from vblora.compact import linear_shape, output_layer_name
from vblora.config import Names, VBLoRAConfig
from vblora.errors import CheckpointError, ConfigError, TargetError
from vblora.layer import AdaptedLinear
from vblora.mixture import ModuleShape

ALL_LINEAR = "all-linear"
_CLASSIFIERS = ("classifier", "score")
HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": _CLASSIFIERS,
    "TOKEN_CLS": _CLASSIFIERS,
    "QUESTION_ANS": ("qa_outputs",),
}
DEFAULT_TARGETS: Mapping[str, Names] = {
    architecture: targets
    for architectures, targets in (
        (("llama", "llama4", "mistral", "mixtral", "qwen2", "qwen3", "smollm3", "olmo2"), ["q_proj", "v_proj"]),
        (("gemma", "gemma2", "gemma3_text", "granite", "stablelm", "gptj", "gpt_neo"), ["q_proj", "v_proj"]),
        (("gemma4",), r".*language_model\..*\.(q_proj|v_proj)"),
        (("gpt2", "gpt_bigcode"), ["c_attn"]),
        (("bloom", "gpt_neox"), ["query_key_value"]),
        (("nemotron_h",), ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (("opt", "bart"), ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
        (("bert", "roberta"), ["query", "value"]),
        (("deberta",), ["in_proj"]),
        (("deberta-v2",), ["query_proj", "key_proj", "value_proj", "dense"]),
        (("t5",), ["q", "k", "v", "o", "wi", "wo"]),
        (("mt5",), ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]),
    )
    for architecture in architectures
}


def find_targets(model: nn.Module, config: VBLoRAConfig) -> dict[str, ModuleShape]:
    """The targets of an adapter by their paths in the base model, as if nothing was wrapped.

    A module in `modules_to_save` is trained as a whole, and is never a target. Raises `TargetError` if there is no
    target, one is no linear layer, or one is not divisible by the vector length; `ConfigError` for a bad pattern, or
    when no targets are given and none are known for this architecture.
    """
    wanted = _default_targets(model) if config.target_modules is None else config.target_modules
    if isinstance(wanted, str) and wanted != ALL_LINEAR and config.layers_to_transform is not None:
        raise ConfigError("layers_to_transform needs target_modules to be a list, not a regular expression")
    modules = dict(base_modules(model))
    if wanted == ALL_LINEAR:
        output = output_layer_name(model)
        names = [name for name, module in modules.items() if linear_shape(module) and name != output]
    else:
        names = [name for name in modules if matches(plain_path(name), wanted, "target_modules")]
    names = [name for name in names if not matches(plain_path(name), config.exclude_modules, "exclude_modules")]
    names = [name for name in names if not _inside(plain_path(name), saved_names(config))]
    exact = set(wanted) if isinstance(wanted, list) else set()
    names = _in_layers(names, exact, config)
    if not names:
        raise TargetError(f"target_modules: no module of the base model matches {wanted!r}")
    shapes = {name: _shape(name, modules[name]) for name in names}
    check_divisible(shapes, config.vector_length)
    return shapes


def saved_names(config: VBLoRAConfig) -> list[str]:
    """`modules_to_save`, with the heads of the task type; which heads a model has is its own affair."""
    return list(dict.fromkeys([*(config.modules_to_save or ()), *HEADS.get(config.task_type or "", ())]))


def _inside(path: str, names: Collection[str]) -> bool:
    return any(f".{name}." in f".{path}." for name in names)


def _in_layers(paths: Sequence[str], exact: Collection[str], config: VBLoRAConfig) -> list[str]:
    """The paths in the layers to transform, and those that are named in full.

    A layer's index is the first number in a path, after one of the patterns where there are any. Raises `TargetError`
    for an index that no path has.
    """
    if config.layers_to_transform is None or config.layers_to_transform == []:
        return list(paths)
    layers = config.layers_to_transform
    wanted = set(layers) if isinstance(layers, list) else {layers}
    indices = {path: _layer_index(plain_path(path), config.layers_pattern) for path in paths}
    if unknown := sorted(wanted - set(indices.values())):
        raise TargetError(f"layers_to_transform: no target lies in layer {unknown[0]}")
    return [path for path, index in indices.items() if index in wanted or plain_path(path) in exact]


def _layer_index(path: str, patterns: Names) -> int | None:
    listed = [patterns] if isinstance(patterns, str) else patterns
    for pattern in listed or [r"[^.]+"]:
        try:
            found = re.match(rf"(?:.*?\.)?(?:{pattern})\.(\d+)\.", path)
        except re.error as error:
            raise ConfigError(f"layers_pattern: {pattern!r} is not a regular expression: {error}") from error
        if found:
            return int(found[found.lastindex or 1])
    return None


def check_divisible(shapes: Mapping[str, ModuleShape], vector_length: int) -> None:
    """Raise `TargetError` naming the first target that `vector_length` does not divide, and the lengths that would."""
    fitting = fitting_lengths(shapes.values())
    if vector_length in fitting:
        return
    name, shape = next(item for item in shapes.items() if any(size % vector_length for size in item[1]))
    raise TargetError(
        f"vector_length {vector_length} does not divide both sizes of {name} (in {shape.in_features}, "
        f"out {shape.out_features}); lengths that divide all {len(shapes)} targets: {', '.join(map(str, fitting))}"
    )


def fitting_lengths(shapes: Iterable[ModuleShape]) -> list[int]:
    """The vector lengths that divide both sizes of every target, ascending."""
    common = math.gcd(*(size for shape in shapes for size in shape))
    return [length for length in range(1, common + 1) if common % length == 0]


def short_names(model: nn.Module, targets: Collection[str]) -> list[str]:
    """A list of names that targets exactly these modules: the last parts of their paths where that is enough."""
    leaves = sorted({path.rpartition(".")[2] for path in targets})
    matched = {name for name, _ in base_modules(model) if matches(plain_path(name), leaves, "target_modules")}
    return leaves if matched == set(targets) else sorted(map(plain_path, targets))


def check_modules(checkpoint: AdapterCheckpoint, shapes: Mapping[str, ModuleShape]) -> None:
    """Raise unless a file holds exactly the targeted modules (`CheckpointError`) in their sizes (`TargetError`)."""
    shapes = {plain_path(path): shape for path, shape in shapes.items()}
    for fault, names in (
        ("the file has no tensors for", shapes.keys() - checkpoint.modules.keys()),
        ("the configuration does not target", checkpoint.modules.keys() - shapes.keys()),
    ):
        if names:
            raise CheckpointError(f"target_modules: {fault} {len(names)} modules, {min(names)} among them")
    length = checkpoint.config.vector_length
    for name, module in checkpoint.modules.items():
        found = module.shape(length)
        if found != shapes[name]:
            raise TargetError(f"{name}: {_sizes(found)} in the adapter, {_sizes(shapes[name])} in the base model")


def _sizes(shape: ModuleShape) -> str:
    return f"in {shape.in_features}, out {shape.out_features}"


def quantised_kind(weight: Tensor) -> str | None:
    """What a weight is stored as, if not as plain floating-point numbers."""
    if type(weight.data) is not Tensor:
        return type(weight.data).__name__
    return None if weight.is_floating_point() else str(weight.dtype)


def base_layer(model: nn.Module, path: str) -> nn.Module:
    """The linear layer at `path`, wrapped or not."""
    module = model.get_submodule(path)
    return module.base_layer if isinstance(module, AdaptedLinear) else module


def wrap(model: nn.Module, path: str) -> AdaptedLinear:
    """The adapted layer at `path`, made if it is not there yet."""
    module = model.get_submodule(path)
    if isinstance(module, AdaptedLinear):
        return module
    layer = AdaptedLinear(module)
    model.set_submodule(path, layer)
    return layer


def unwrap(model: nn.Module, path: str) -> None:
    """Put the base layer back at `path`."""
    layer = model.get_submodule(path)
    assert isinstance(layer, AdaptedLinear)
    model.set_submodule(path, layer.base_layer)


def plain_path(path: str) -> str:
    """A path without what `torch.compile` puts into it: files know modules by these."""
    return path.replace("_orig_mod.", "")


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base model by its path, as if nothing was wrapped."""
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, AdaptedLinear):
            inside, module = f"{name}.", module.base_layer
        if name:
            yield name, module


def matches(name: str, wanted: Names, field: str) -> bool:
    """A string is a regular expression for the whole name; a list holds names and suffixes after a dot."""
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, name) is not None
        except re.error as error:
            raise ConfigError(f"{field}: {wanted!r} is not a regular expression: {error}") from error
    return any(name == entry or name.endswith(f".{entry}") for entry in wanted or ())


def _shape(name: str, module: nn.Module) -> ModuleShape:
    shape = linear_shape(module)
    if shape is None:
        raise TargetError(
            f"target_modules: {name} is a {type(module).__name__}, not a torch.nn.Linear or a transformers Conv1D"
        )
    return shape


def _default_targets(model: nn.Module) -> Names:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(kind, str) or kind not in DEFAULT_TARGETS:
        raise ConfigError(f"target_modules must be given: none are known for the architecture {kind!r}")
    return DEFAULT_TARGETS[kind]
