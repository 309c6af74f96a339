"""Small real things for tests: a byte-level tokenizer, tiny random base models, random adapters.

Nothing here is a mock, nothing is fetched, and every result depends on its arguments alone. Heads are untied,
`initializer_range` is 0.2 and banks are U(-0.5, 0.5): with the usual small initialisation an adapter would hardly
change a greedy answer and a test of adapters would show nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vblora.checkpoint import AdapterCheckpoint, TopKModule, write_adapter
from vblora.config import VBLoRAConfig
from vblora.mixture import TopK, topk_mixture

VOCAB_SIZE = 300
CONTEXT = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_CORPUS = ["the quick brown fox jumps over the lazy dog while the restaurant serves the best food of the town"] * 3
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@lru_cache(maxsize=1)
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens which starts every text with ``<s>`` and carries a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT_TEMPLATE, **_SPECIAL)


_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
}
_COMMON: dict[str, Any] = {"initializer_range": 0.2, "tie_word_embeddings": False}
_TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 16, "sliding_window": 8}

# The name of a configuration and of a model in transformers, and the fields in which it differs from `_SHAPE`.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, **_EXPERTS}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"logit_scale": 1.0}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"num_experts": 4, **_EXPERTS}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4, "sliding_window": 8, **_EXPERTS}),
}
FAMILIES = tuple(_FAMILIES)
CONFIGURATIONS = tuple(configuration for configuration, _, _ in _FAMILIES.values())


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model in eval mode, float32; `overrides` replace entries of its transformers configuration."""
    config_name, model_name, fields = _FAMILIES[family]
    config = getattr(transformers, config_name)(**{**_SHAPE, **fields, **_COMMON, **_TOKENS, **overrides})
    model_class: Callable[..., PreTrainedModel] = getattr(transformers, model_name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config).eval()


def save_tiny_model(directory: Path, family: str = "llama", **overrides: Any) -> Path:
    """Write `tiny_model(family, **overrides)` and its tokenizer as a folder that any loader takes; returns it."""
    tiny_model(family, **overrides).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def linear_shapes(model: torch.nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of every Linear or Conv1D whose path is one of `targets` or ends with ``.target``."""
    return {
        path: (module.in_features, module.out_features)
        if isinstance(module, torch.nn.Linear)
        else (int(module.weight.shape[0]), int(module.weight.shape[1]))
        for path, module in model.named_modules()
        if any(path == target or path.endswith(f".{target}") for target in targets)
    }


def random_adapter(
    model: torch.nn.Module,
    rank: int = 4,
    num_vectors: int = 24,
    vector_length: int = 8,
    topk: int = 2,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    bank: torch.Tensor | None = None,
) -> AdapterCheckpoint:
    """A top-k adapter for `model`: bank ~ U(-0.5, 0.5), or the given `bank` (num_vectors, vector_length)."""
    generator = torch.Generator().manual_seed(seed)
    if bank is None:
        bank = torch.rand(num_vectors, vector_length, generator=generator) - 0.5

    def mixture(tiles: int, *, transposed: bool) -> TopK:
        shape = (tiles, rank, num_vectors) if transposed else (rank, tiles, num_vectors)
        return topk_mixture(torch.randn(*shape, generator=generator), topk)

    modules = {
        path: TopKModule(
            a=mixture(inputs // vector_length, transposed=False), b=mixture(outputs // vector_length, transposed=True)
        )
        for path, (inputs, outputs) in linear_shapes(model, targets).items()
    }
    config = VBLoRAConfig(
        r=rank,
        num_vectors=num_vectors,
        vector_length=vector_length,
        topk=topk,
        target_modules=list(targets),
        save_only_topk_weights=True,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )
    return AdapterCheckpoint(config=config, bank=bank, modules=modules, extras={}).topk()


def save_random_adapter(directory: Path, model: torch.nn.Module, **arguments: Any) -> Path:
    """Write `random_adapter(model, **arguments)` into `directory`, which it returns."""
    directory.mkdir(parents=True, exist_ok=True)
    write_adapter(directory, random_adapter(model, **arguments))
    return directory
