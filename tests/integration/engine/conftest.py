from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving.adapters.residency import Residency
from serving.engine import Engine
from serving.engine.core import EngineCore
from serving.engine.grammar import Grammars
from serving.engine.model_runner import ModelRunner
from serving.engine.observer import SilentObserver
from serving.engine.vocabulary import Vocabulary
from serving.types import EngineSettings
from tests.support import VOCAB_SIZE, tiny_model, tiny_tokenizer
from vblora.integrations.base_models import BaseModel


def tiny_engine(**settings: object) -> Engine:
    base = BaseModel("tiny", tiny_model(), tiny_tokenizer())
    defaults = {"model": "tiny", "max_batch_size": 8, "max_batched_tokens": 64, "kv_cache_bytes": 1 << 22}
    return Engine(base, EngineSettings(**{**defaults, **settings}))  # type: ignore[arg-type]


def tiny_core(runner: ModelRunner, residency: Residency, settings: EngineSettings) -> EngineCore:
    """The steps of an engine without its thread."""
    tokenizer, ends = tiny_tokenizer(), frozenset({1})
    grammars = Grammars(Vocabulary(tokenizer, VOCAB_SIZE, ends))
    return EngineCore(runner, tokenizer.backend_tokenizer, ends, residency, grammars, settings, SilentObserver())


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = tiny_engine()
    engine.start()
    yield engine
    engine.close()
