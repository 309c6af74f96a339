"""Flags for the fields of `VBLoRAConfig` and of `TrainingOptions`, shared by the commands. Knows no command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import typer

from vblora.config import PEFT_TYPE, VBLoRAConfig
from vblora.loop import MIXED_PRECISION, TrainingOptions

METHOD = "Adapter"
TRAINING = "Training"
LISTS = ("modules_to_save", "layers_to_transform")  # never a pattern
Result = TypeVar("Result")

CONFIG_HELP = {
    "r": "Rank of the update of each layer.",
    "num_vectors": "h: vectors in the bank.",
    "vector_length": "b: length of a vector; divides both sizes of every target. `vblora params` shows which do.",
    "topk": "k: bank vectors mixed into one sub-vector.",
    "target_modules": "Layers to adapt: names a,b,c; all-linear; or a regular expression for whole names. "
    "Unless given: the usual ones of the architecture.",
    "exclude_modules": "Layers to leave out: names a,b,c, or a regular expression.",
    "save_only_topk_weights": "Write the small form, for inference only: it cannot be trained on.",
    "vblora_dropout": "Probability of dropping an input of the update while training.",
    "fan_in_fan_out": "Weights are stored (in, out), as in GPT-2; corrected where it is wrong.",
    "bias": "Biases to train: none, all, or vblora_only (those of the adapted layers).",
    "modules_to_save": "Modules to train as a whole: a,b,c.",
    "init_vector_bank_bound": "The bank starts uniform between minus and plus this.",
    "init_logits_std": "Logits start normal with this standard deviation.",
    "layers_to_transform": "Adapt only the layers of these indices: 0,1,2.",
    "layers_pattern": "Name of the list of layers in the model, for --layers-to-transform.",
}
TRAINING_HELP = {
    "epochs": "Passes over the rows.",
    "max_steps": "Optimizer steps, instead of --epochs.",
    "batch_size": "Rows a step.",
    "logits_lr": "Learning rate of the logits.",
    "bank_lr": "Learning rate of the bank; a run of a few hundred steps wants 5e-3.",
    "other_lr": "Learning rate of biases and of modules trained as a whole.",
    "warmup_ratio": "Share of the steps in which the rates climb; then they fall to zero.",
    "max_length": "Tokens a row; longer ones are cut.",
    "eval_fraction": "Share of the rows that is held out to measure on.",
    "save_steps": "Steps between snapshots to resume from; 0: none.",
    "seed": "Seed of initialisation, order and dropout.",
    "packing": "Lay the rows of a step end to end instead of padding them: same loss, less work.",
    "mixed_precision": f"Compute in another dtype than the weights': {' or '.join(MIXED_PRECISION)}.",
}
_TYPES: Mapping[str, Any] = {"max_steps": int | None, "packing": bool, "mixed_precision": str, "bias": str}


def flag(help_text: str, panel: str) -> typer.models.OptionInfo:
    """A flag with a help text, in a panel of the command's help."""
    option: typer.models.OptionInfo = typer.Option(help=help_text, rich_help_panel=panel)
    return option


def takes_config(*, without: Iterable[str] = ()) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Give a command a flag for each field of an adapter's configuration; it is called with `config` instead."""
    help_texts = {name: text for name, text in CONFIG_HELP.items() if name not in without}
    return _takes("config", VBLoRAConfig, help_texts, METHOD, _config)


def takes_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Give a command a flag for each option of training; it is called with `options` instead."""
    return _takes("options", TrainingOptions, TRAINING_HELP, TRAINING, lambda values: TrainingOptions(**values))(
        command
    )


def _takes(
    argument: str,
    made_of: type[VBLoRAConfig] | type[TrainingOptions],
    help_texts: Mapping[str, str],
    panel: str,
    make: Callable[[dict[str, Any]], object],
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    defaults = {field.name: field.default for field in fields(made_of)}
    flags = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults[name],
            annotation=Annotated[_flag_type(name, defaults[name]), flag(text, panel)],
        )
        for name, text in help_texts.items()
    ]

    def decorate(command: Callable[..., Result]) -> Callable[..., Result]:
        signature = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def call(**given: Any) -> Result:
            values = {name: given.pop(name) for name in help_texts}
            return command(**given, **{argument: make(values)})

        kept = [parameter for name, parameter in signature.parameters.items() if name != argument]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in kept] + flags
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del call.__wrapped__  # so that nobody looks for the flags there
        return call

    return decorate


def _flag_type(name: str, default: object) -> Any:
    """The type of a field on the command line: lists and patterns are one string there."""
    return _TYPES.get(name, str | None if default is None else type(default))


def _config(values: dict[str, Any]) -> VBLoRAConfig:
    """Lists are taken apart at the commas."""
    for name in ("target_modules", "exclude_modules", *LISTS):
        if name in values:
            values[name] = _listed(values[name], always=name in LISTS)
    layers = values.get("layers_to_transform")
    if isinstance(layers, list):
        values["layers_to_transform"] = [int(index) if index.isdecimal() else index for index in layers]
    return VBLoRAConfig.from_dict({"peft_type": PEFT_TYPE, **values})


def _listed(value: object, *, always: bool) -> object:
    """``a,b`` and plain names are lists; ``all-linear`` and what looks like a pattern stay strings."""
    if not isinstance(value, str) or value == "all-linear":
        return value
    is_pattern = not always and any(character in value for character in r"\*+?()[]{}|^$")
    return value if is_pattern else [part.strip() for part in value.split(",") if part.strip()]
