"""What would run wrong is refused at start, what runs right is served: tiny random models of many families."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from serving.engine.attention import Span
from serving.engine.compatibility import deviation
from serving.engine.model_runner import ModelRunner
from serving.errors import StartupError
from serving.types import EngineSettings
from tests.support import CONFIGURATIONS, tiny_model
from vblora.batched import Segment

SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SERVED: dict[str, dict[str, Any]] = {
    "LlamaConfig": {}, "Qwen2Config": {}, "Qwen3Config": {}, "MistralConfig": {"sliding_window": 5}, "Phi3Config": {},
    "MixtralConfig": {"num_local_experts": 2}, "Gemma2Config": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "Gemma3TextConfig": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoXConfig": {}, "OPTConfig": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Olmo2Config": {}, "CohereConfig": {}, "GraniteConfig": {},
    "SmolLM3Config": {}, "PhiConfig": {}, "Starcoder2Config": {}, "StableLmConfig": {}, "NemotronConfig": {},
    "GptOssConfig": {"num_local_experts": 2, "sliding_window": 5, "num_experts_per_tok": 1},
}  # fmt: skip
REFUSED = {
    "FalconConfig": {"head_dim": None},
    "BloomConfig": {"n_head": 4},
    "MptConfig": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "T5Config": {},
    "Llama4TextConfig": {"intermediate_size_mlp": 64, "num_local_experts": 2},
}
README = Path(__file__).parents[3] / "README.md"


def listed(configurations: Iterable[str]) -> str:
    names = {name.removesuffix("Config").removesuffix("Text") for name in configurations}
    return ", ".join(sorted(names, key=str.lower))


def test_the_readme_lists_what_is_served() -> None:
    """The first list is of test_parity.py, the others of this file."""
    text = (
        "- The same tokens as `generate` of `transformers` on the base with that one adapter merged, in mixed batches: "
        f"{listed(CONFIGURATIONS)}.\n"
        f"- Served, compared at start only: {listed(SERVED.keys() - set(CONFIGURATIONS))}.\n"
        f"- Refused at start: {listed(REFUSED)}, and whatever fails the comparison.\n"
    )
    assert text in README.read_text(encoding="utf-8"), text


def build(name: str, overrides: dict[str, Any]) -> PreTrainedModel:
    fields = {field: value for field, value in {**SMALL, **overrides}.items() if value is not None}
    config = getattr(transformers, name)(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = transformers.T5ForConditionalGeneration if name == "T5Config" else None
        model = kind(config) if kind else AutoModelForCausalLM.from_config(config)
    return model.float().eval()


def run(model: PreTrainedModel, **settings: Any) -> ModelRunner:
    return ModelRunner(model, EngineSettings(model="tiny", kv_cache_bytes=1 << 20, max_batch_size=4, **settings))


@pytest.mark.parametrize("name", SERVED)
def test_decoders_of_the_attention_interface_are_served(name: str) -> None:
    runner = run(build(name, SERVED[name]))
    assert runner.layout.modules


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_would_let_requests_see_each_other_are_refused(name: str) -> None:
    with pytest.raises(StartupError):
        run(build(name, REFUSED[name]))


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rotary_positions_that_follow_the_longest_request_are_refused(rope: str) -> None:
    model = tiny_model("llama")
    model.config.rope_parameters = {"rope_type": rope, "rope_theta": 10_000.0, "factor": 2.0}
    with pytest.raises(StartupError, match=f"{rope} rotary positions"):
        run(model)


def two_ropes(short: float, long: float) -> PreTrainedModel:
    """A model trained on 32 positions, with one set of frequencies up to there and one beyond."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 32,
        "short_factor": [short] * 8, "long_factor": [long] * 8,
    }  # fmt: skip
    return tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=32)


@pytest.mark.parametrize(("max_model_len", "factors"), [(None, (4.0, 4.0)), (33, (4.0, 4.0)), (32, (1.0, 1.0))])
def test_of_two_sets_of_frequencies_all_requests_have_the_longest_one_s(
    max_model_len: int | None, factors: tuple[float, float]
) -> None:
    runner = run(two_ropes(1.0, 4.0), max_model_len=max_model_len)
    short, long = [5, 6, 7, 8], [9, *range(3, 31)]
    spans = [Span([0], 0, len(short)), Span([1, 2], 0, len(long))]
    together = runner._forward(short + long, spans, [Segment(0, 33)], range(33))
    alone = runner._forward(short, spans[:1], [Segment(0, 4)], range(4))
    assert torch.allclose(together[:4], alone, atol=1e-5)
    for text, got in ((short, together[:4]), (long, together[4:])):
        with torch.inference_mode():
            expected = two_ropes(*factors)(torch.tensor([text])).logits[0]
            other = two_ropes(*(5.0 - factor for factor in factors))(torch.tensor([text])).logits[0]
        assert torch.allclose(got, expected, atol=1e-4)
        assert not torch.allclose(got, other, atol=1e-1)


def test_chunked_layers_are_refused() -> None:
    model = tiny_model("gemma3")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(StartupError, match="chunked_attention"):
        run(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_that_leaks_is_found_by_the_probe(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of defence: break the masks and the model must not be served."""
    from serving.engine import attention

    def everything(self: Any, index: int, window: int | None) -> Any:
        span, positions = self.spans[index], self._positions(index)
        return attention._Gather(positions, torch.ones(span.length, len(positions), dtype=torch.bool))

    model = tiny_model("llama").to(dtype)
    assert run(model)
    monkeypatch.setattr(attention.AttentionStep, "prefilling", everything)
    with pytest.raises(StartupError, match="other logits in a batch than alone"):
        run(tiny_model("llama").to(dtype))


def test_a_token_that_is_all_rounding_does_not_count() -> None:
    logits = torch.randn(8, 100)
    logits[0] = 70.0
    rounded = logits + 1e-3 * torch.randn(8, 100)
    assert deviation(rounded, logits) < 0.01
    assert deviation(logits.roll(1, dims=0), logits) > 1
    assert not deviation(rounded * float("nan"), logits) <= 1


def test_learned_positions_bound_the_context() -> None:
    assert run(tiny_model("gpt2", max_position_embeddings=64)).max_model_len == 64
    with pytest.raises(StartupError, match="positions end at 64"):
        run(tiny_model("gpt2", max_position_embeddings=64), max_model_len=65)


def test_the_context_shrinks_to_the_cache_when_nobody_set_it() -> None:
    runner = run(tiny_model("llama", max_position_embeddings=100_000))
    assert runner.max_model_len == runner.num_blocks * runner.block_size < 100_000


def test_the_output_layer_is_not_adapted() -> None:
    layout = run(tiny_model("llama")).layout
    assert layout.output_layer == "lm_head"
    assert "lm_head" not in layout.modules
