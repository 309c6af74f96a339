"""How the settings are told of: their flags and docs/settings.md. Knows no values but defaults."""

from __future__ import annotations

from typing import get_args

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from serving.settings import ENV_PREFIX, ServerSettings, flag_of


def settings_reference() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Of `vblora-serve run`. A flag wins over the environment, that over the YAML file of `--config` (names as the",
        "flags, with `-` or `_`), that over the default. In the environment lists are comma-separated.",
        "",
        "| flag | environment | default | what it does |",
        "|---|---|---|---|",
    ]
    for name, field in ServerSettings.model_fields.items():
        flag = "MODEL" if name == "model" else f"`{flag_of(name)}`"
        lines.append(f"| {flag} | `{ENV_PREFIX}{name.upper()}` | {default_text(field)} | {field.description} |")
    return "\n".join([*lines, ""])


def default_text(field: FieldInfo) -> str:
    """A setting's default as its documentation shows it."""
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "the user's data folder"
    if field.default is None or field.default == ():
        return "none"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, ByteSize):
        return field.default.human_readable(decimal=False)
    return str(field.default)


def is_list(field: FieldInfo) -> bool:
    """Whether the setting's flag may be repeated."""
    return len(get_args(field.annotation)) == 2 and get_args(field.annotation)[1] is Ellipsis
