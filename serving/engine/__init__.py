"""The engine: continuous batching of requests with different adapters over one base model."""

from serving.engine.engine import Engine
from serving.engine.streams import Generation

__all__ = ["Engine", "Generation"]
