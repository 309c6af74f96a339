from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving.engine import Engine
from serving.types import EngineSettings
from tests.support import tiny_model, tiny_tokenizer
from vblora.integrations.base_models import BaseModel


def tiny_engine(**settings: object) -> Engine:
    base = BaseModel("tiny", tiny_model(), tiny_tokenizer())
    defaults = {"model": "tiny", "max_batch_size": 8, "max_batched_tokens": 64, "kv_cache_bytes": 1 << 22}
    return Engine(base, EngineSettings(**{**defaults, **settings}))  # type: ignore[arg-type]


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = tiny_engine()
    engine.start()
    yield engine
    engine.close()
