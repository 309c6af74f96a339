"""Training on tiny models: the loss and its gradient, learning, determinism, resuming, banks."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedModel

from tests.support import VOCAB_SIZE, tiny_model, tiny_tokenizer
from vblora import (
    CheckpointError,
    ConfigError,
    DataError,
    TargetError,
    VBLoRAConfig,
    VBLoRAModel,
    VectorBank,
    get_vblora_model,
)
from vblora.checkpoint import content_hash, read_adapter
from vblora.data import Batch, Row, collate, encode, pack
from vblora.integrations.base_models import BaseModel
from vblora.loop import TrainingOptions, schedule
from vblora.loss import batch_loss, evaluate_loss, head_loss
from vblora.record import LOSSES_FILE, PLOT_FILE
from vblora.snapshot import SNAPSHOT_FILE
from vblora.training import TrainingReport, train

ROWS = [
    Row({"prompt": f"name: {name} | food: {food}", "completion": f" {name} serves {food} food."}, f"rows:{number}")
    for number, (name, food) in enumerate(
        [("Aroma", "Thai"), ("Cotto", "Greek"), ("Eagle", "Indian"), ("Vaults", "French"), ("Mill", "Thai")], 1
    )
]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 2,
}


def base(family: str = "llama") -> BaseModel:
    return BaseModel("tiny", tiny_model(family), tiny_tokenizer())


def config(**values: Any) -> VBLoRAConfig:
    return VBLoRAConfig(
        **{"num_vectors": 16, "vector_length": 16, "target_modules": "all-linear", "vblora_dropout": 0.1, **values}
    )


def options(**values: Any) -> TrainingOptions:
    return TrainingOptions(**{"max_steps": 12, "batch_size": 2, "save_steps": 0, "eval_fraction": 0.2, **values})


def families() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    return {
        **{family: tiny_model(family) for family in ("llama", "gpt2", "gemma2", "gemma3")},
        "cohere": CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)).eval(),
        "granite": GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)).eval(),
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3", "cohere", "granite"])
def test_the_loss_is_that_of_the_whole_model(family: str) -> None:
    model = families()[family]
    ids = torch.randint(3, VOCAB_SIZE, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = torch.where((torch.arange(12) > 4) & (mask == 1), ids.roll(-1, 1), -100)
    labels[0, 11] = labels[1, 7] = -100
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss, count = batch_loss(model, Batch({"input_ids": ids, "attention_mask": mask}, labels))
    assert count == int((labels != -100).sum())
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))


def test_the_gradient_is_that_of_all_logits_at_once() -> None:
    model = tiny_model("gemma2").requires_grad_(False)
    hidden = torch.randn(300, 64, requires_grad=True)
    labels = torch.randint(VOCAB_SIZE, (300,))
    (found,) = torch.autograd.grad(head_loss(model, hidden, labels) / 300, hidden)
    capped = torch.tanh(model.lm_head(hidden) / 10) * 10
    (wanted,) = torch.autograd.grad(F.cross_entropy(capped, labels), hidden)
    torch.testing.assert_close(found, wanted)


def test_an_output_layer_that_is_trained_gets_its_gradient() -> None:
    model = tiny_model("gemma2").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    hidden, labels = torch.randn(300, 64), torch.randint(VOCAB_SIZE, (300,))
    (found,) = torch.autograd.grad(head_loss(model, hidden, labels), model.lm_head.weight)
    (wanted,) = torch.autograd.grad(
        F.cross_entropy(torch.tanh(model.lm_head(hidden) / 10) * 10, labels, reduction="sum"), model.lm_head.weight
    )
    torch.testing.assert_close(found, wanted)


def test_unlabelled_positions_never_get_logits() -> None:
    model = tiny_model().requires_grad_(False)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    labels = torch.full((2, 200), -100)
    labels[:, 50:130] = 5
    batch_loss(model, Batch({"input_ids": torch.ones_like(labels), "attention_mask": torch.ones_like(labels)}, labels))
    assert sum(seen) == 160
    assert max(seen) <= 128


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_training_lowers_the_loss_and_writes_the_adapter(family: str, tmp_path: Path) -> None:
    model = base(family)
    before = evaluate_loss(model.model, model.tokenizer, ROWS)
    report = train(model, config(), ROWS, tmp_path, options(max_steps=60, bank_lr=1e-2), eval_rows=ROWS)
    assert report.held_out_after is not None
    assert report.held_out_after < before - 0.3
    fresh = VBLoRAModel.from_pretrained(tiny_model(family), tmp_path)
    assert evaluate_loss(fresh, model.tokenizer, [dict(row.values) for row in ROWS]) == pytest.approx(
        report.held_out_after, rel=1e-5
    )
    saved = json.loads((tmp_path / "training.json").read_text())
    assert saved["report"]["losses"] == report.losses
    assert saved["options"]["seed"] == 0
    checkpoint = read_adapter(tmp_path)
    assert checkpoint.config.base_model_name_or_path == "tiny"
    assert checkpoint.config.task_type == "CAUSAL_LM"


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(base(), config(), ROWS, tmp_path / name, options(seed=seed))
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"])
def test_packed_rows_have_the_loss_of_padded_ones(family: str) -> None:
    model = get_vblora_model(tiny_model(family), config(vblora_dropout=0.0, init_vector_bank_bound=0.5)).eval()
    examples = [encode(row, tiny_tokenizer(), 512) for row in ROWS]
    assert len({len(example.tokens) for example in examples}) > 2
    (packed, count), (padded, same) = (batch_loss(model, batch) for batch in (pack(examples), collate(examples, 2)))
    assert count == same
    torch.testing.assert_close(packed, padded)
    found, wanted = (torch.autograd.grad(loss, model.bank().vectors, retain_graph=True)[0] for loss in (packed, padded))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_packing_is_refused_where_rows_would_see_each_other(tmp_path: Path) -> None:
    """Attention that is called without its mask stands for an architecture that cannot keep rows apart."""
    model = base()
    for layer in model.model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
        )
    with pytest.raises(ConfigError, match="packing: rows in one sequence see each other"):
        train(model, config(), ROWS, tmp_path / "out", options(packing=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [{"packing": True}, {"mixed_precision": "bfloat16"}])
def test_it_trains_packed_and_in_mixed_precision(values: dict[str, Any], tmp_path: Path) -> None:
    plain = train(base(), config(vblora_dropout=0.0), ROWS, tmp_path / "a", options())
    other = train(base(), config(vblora_dropout=0.0), ROWS, tmp_path / "b", options(**values))
    exact = "packing" in values
    assert other.losses == pytest.approx(plain.losses, rel=1e-4 if exact else 0.05)
    assert exact or other.losses != plain.losses
    assert read_adapter(tmp_path / "b").bank.dtype == torch.float32


@pytest.mark.parametrize("composed", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(composed: bool) -> None:
    batch = collate([encode(row, tiny_tokenizer(), 512) for row in ROWS], 2)
    gradients, calls = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = get_vblora_model(tiny_model(), config(vblora_dropout=0.0)).train()
        layer = model.get_submodule("model.model.layers.0.mlp.up_proj")
        seen: list[int] = []
        layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(1))
        if checkpointed:
            model.activation_checkpointing_enable()
        with model.composed() if composed else nullcontext():
            loss, _ = batch_loss(model, batch)
            gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
        calls.append(len(seen))
    assert calls == [1, 2]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_step_composes_all_layers_in_one_operation(tmp_path: Path) -> None:
    with torch.profiler.profile() as profile:
        train(base(), config(), ROWS, tmp_path, options(max_steps=3, eval_fraction=0))
    composed = [event.count for event in profile.key_averages() if event.key == "aten::_embedding_bag"]
    assert composed == [3]


def test_modules_and_biases_are_trained_from_the_loop(tmp_path: Path) -> None:
    made = config(target_modules=["c_attn"], fan_in_fan_out=True, bias="vblora_only", modules_to_save=["lm_head"])
    train(base("gpt2"), made, ROWS, tmp_path, options(other_lr=1e-2))
    extras, own = read_adapter(tmp_path).extras, tiny_model("gpt2").state_dict()
    assert set(extras) == {"lm_head.weight", *(f"transformer.h.{layer}.attn.c_attn.bias" for layer in (0, 1))}
    assert not any(torch.equal(tensor, own[name]) for name, tensor in extras.items())


def test_a_run_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = train(base(), config(), ROWS, tmp_path / "a", options())
    lines = (tmp_path / "a" / LOSSES_FILE).read_text().splitlines()
    assert lines[0] == "step,loss"
    assert [float(line.split(",")[1]) for line in lines[1:]] == report.losses
    with Image.open(tmp_path / "a" / PLOT_FILE) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train(base(), config(), ROWS, tmp_path / "b", options())
    assert not (tmp_path / "b" / PLOT_FILE).exists()
    assert (tmp_path / "b" / LOSSES_FILE).read_text() == (tmp_path / "a" / LOSSES_FILE).read_text()


class Interrupted(Exception):
    pass


def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole = train(base(), config(), ROWS, tmp_path / "whole", options(save_steps=5))

    def interrupt(report: TrainingReport) -> None:
        if len(report.losses) == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(base(), config(), ROWS, tmp_path / "cut", options(save_steps=5), on_step=interrupt)
    assert (tmp_path / "cut" / SNAPSHOT_FILE).exists()
    with pytest.raises(CheckpointError, match="other settings or other data"):
        train(base(), config(r=2), ROWS, tmp_path / "cut", options(save_steps=5), resume=True)
    resumed = train(base(), config(), ROWS, tmp_path / "cut", options(save_steps=5), resume=True)
    assert resumed == whole
    whole_hash, cut_hash = (content_hash(read_adapter(tmp_path / name)) for name in ("whole", "cut"))
    assert whole_hash == cut_hash
    assert not (tmp_path / "cut" / SNAPSHOT_FILE.parent).exists()


def test_a_run_on_another_bank_is_not_resumed(tmp_path: Path) -> None:
    def interrupt(report: TrainingReport) -> None:
        if len(report.losses) == 7:
            raise Interrupted

    first, second = (VectorBank(torch.full((16, 16), value)) for value in (0.1, 0.2))
    every = options(save_steps=5)
    with pytest.raises(Interrupted):
        train(base(), config(), ROWS, tmp_path, every, bank=first, freeze_bank=True, on_step=interrupt)
    for bank, freeze_bank in ((second, True), (first, False)):
        with pytest.raises(CheckpointError, match="other settings or other data"):
            train(base(), config(), ROWS, tmp_path, every, bank=bank, freeze_bank=freeze_bank, resume=True)
    train(base(), config(), ROWS, tmp_path, every, bank=first, freeze_bank=True, resume=True)
    given = json.loads((tmp_path / "training.json").read_text())["options"]
    assert (given["bank"], given["freeze_bank"]) == (first.hash, True)


def test_nothing_or_damage_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(base(), config(), ROWS, tmp_path, options(), resume=True)
    (tmp_path / SNAPSHOT_FILE).parent.mkdir()
    (tmp_path / SNAPSHOT_FILE).write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="damaged"):
        train(base(), config(), ROWS, tmp_path, options(), resume=True)


def test_a_frozen_bank_is_written_as_it_was(tmp_path: Path) -> None:
    bank = VectorBank.random(16, 16, 0.5)
    before = bank.hash
    train(base(), config(), ROWS, tmp_path, options(), bank=bank, freeze_bank=True)
    assert bank.hash == before == VectorBank.load(tmp_path).hash
    train(base(), config(), ROWS, tmp_path, options(), bank=bank)
    with pytest.raises(ConfigError, match="needs a bank"):
        train(base(), config(), ROWS, tmp_path, options(), freeze_bank=True)


def test_training_goes_on_from_an_adapter(tmp_path: Path) -> None:
    first = train(base(), config(), ROWS, tmp_path / "first", options())
    small = config(save_only_topk_weights=True)
    more = train(base(), small, ROWS, tmp_path / "more", options(), start=tmp_path / "first", freeze_bank=True)
    assert first.held_out_before != first.held_out_after == more.held_out_before != more.held_out_after
    assert VectorBank.load(tmp_path / "more").hash == VectorBank.load(tmp_path / "first").hash
    assert not read_adapter(tmp_path / "more").trainable
    given = json.loads((tmp_path / "more" / "training.json").read_text())["options"]
    assert given["start"] == content_hash(read_adapter(tmp_path / "first"))


def test_an_adapter_that_cannot_be_gone_on_with(tmp_path: Path) -> None:
    start = tmp_path / "start"
    train(base(), config(), ROWS, start, options(max_steps=1))
    with pytest.raises(ConfigError, match="r is 2, but 4 in the adapter to start from"):
        train(base(), config(r=2), ROWS, tmp_path / "out", options(), start=start)
    with pytest.raises(ConfigError, match="has other targets"):
        train(base(), config(target_modules=["q_proj"]), ROWS, tmp_path / "out", options(), start=start)
    with pytest.raises(ConfigError, match="brings its own"):
        train(base(), config(), ROWS, tmp_path / "out", options(), start=start, bank=VectorBank.random(16, 16, 0.5))
    train(base(), config(save_only_topk_weights=True), ROWS, start, options(max_steps=1))
    with pytest.raises(CheckpointError, match="cannot be trained"):
        train(base(), config(), ROWS, tmp_path / "out", options(), start=start)
    assert not (tmp_path / "out").exists()


def test_topk_only_output(tmp_path: Path) -> None:
    train(base(), config(save_only_topk_weights=True), ROWS, tmp_path, options(max_steps=1))
    assert not read_adapter(tmp_path).trainable


def test_schedule_climbs_and_falls() -> None:
    factors = [schedule(step, 10, 0.2) for step in range(10)]
    assert factors == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert schedule(0, 1, 0.0) == 1.0


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"max_steps": 0},
        {"batch_size": 0},
        {"logits_lr": -1.0},
        {"warmup_ratio": 1.0},
        {"seed": -1},
        {"mixed_precision": "half"},
    ],
)
def test_bad_options(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        TrainingOptions(**values)


def test_steps_follow_epochs_unless_given() -> None:
    assert TrainingOptions(epochs=3, batch_size=4).steps(9) == 9
    assert TrainingOptions(max_steps=5).steps(9) == 5


def test_bad_rows_and_lengths_stop_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="rows:9"):
        train(base(), config(), [*ROWS, Row({"prompt": 3, "completion": ""}, "rows:9")], out, options())
    with pytest.raises(TargetError, match=r"lengths that divide all 14 targets: 1, 2, 4, 8, 16, 32$"):
        train(base(), config(vector_length=48), ROWS, out, options())
    assert not out.exists()
