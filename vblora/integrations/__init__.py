"""Where `vblora` meets other libraries: base models from `transformers`. The method itself needs nothing of it."""

from __future__ import annotations

from vblora.errors import VBLoRAError


class BaseModelError(VBLoRAError):
    """A base model cannot be found, converted or loaded; the message says what to do."""
