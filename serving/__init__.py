"""The multi-tenant inference server. The engine is also usable in process: `Engine.from_settings(...)`.

Importing this package loads no model library; `Engine` is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serving.types import EngineSettings, GenerationEvent, GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from serving.engine import Engine

__all__ = ["Engine", "EngineSettings", "GenerationEvent", "GenerationRequest", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name != "Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serving.engine import Engine

    return Engine
