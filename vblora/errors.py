"""The errors of the method, one tree. Knows no HTTP and no files' whereabouts: messages never carry a server's paths.

    VBLoRAError
    ├── ConfigError        a hyperparameter is wrong, or not supported
    ├── TargetError        a target module is missing, of a wrong type, or not divisible
    ├── AdapterNameError   an adapter's name is unknown, taken or unusable
    ├── CheckpointError    an adapter's file fails a check
    ├── IncompatibleError  a sound adapter that does not fit the base model or a limit
    ├── MergeError         merging would make a weight NaN or infinite, or a weight is quantised
    └── DataError          a row of training data is bad

All but the base are also `ValueError`, which is what PEFT raises in these cases.
"""

from __future__ import annotations


class VBLoRAError(Exception):
    """Base of every error that `vblora` raises on purpose."""


class ConfigError(VBLoRAError, ValueError):
    """A hyperparameter is out of its range, or asks for something that is not supported."""


class TargetError(VBLoRAError, ValueError):
    """A target module does not exist, has an unsupported type, or its sizes are not divisible by the vector length."""


class AdapterNameError(VBLoRAError, ValueError):
    """An adapter's name is unknown, already taken, or cannot be used."""


class CheckpointError(VBLoRAError, ValueError):
    """An adapter's file fails a check; the message names the tensor and the check."""


class IncompatibleError(VBLoRAError, ValueError):
    """A sound adapter that does not fit. `field` is the entry of its configuration at fault, like ``r``."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class MergeError(VBLoRAError, ValueError):
    """Merging would put NaN or infinity into the base model's weights, or they are quantised."""


class DataError(VBLoRAError, ValueError):
    """A row of training data is bad; the message starts with the file and the line."""
