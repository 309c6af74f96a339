"""`VBLoRAModel`: adding, switching, sharing, saving, deleting, on a transformers model and on a plain module."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support import VOCAB_SIZE, save_random_adapter, tiny_model
from vblora import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    TargetError,
    VBLoRAConfig,
    VBLoRAModel,
    VectorBank,
    get_vblora_model,
    param_groups,
    read_adapter,
)
from vblora.checkpoint import content_hash
from vblora.layer import TopKAdapter


def config(**changes: Any) -> VBLoRAConfig:
    values: dict[str, Any] = {
        "r": 2,
        "num_vectors": 12,
        "vector_length": 16,
        "target_modules": ["q_proj", "v_proj"],
        "init_vector_bank_bound": 0.5,
    }
    return VBLoRAConfig(**{**values, **changes})


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    ids = torch.randint(VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(1))
    logits: Tensor = model(input_ids=ids).logits
    return logits


@pytest.fixture
def model() -> VBLoRAModel:
    torch.manual_seed(0)
    return get_vblora_model(tiny_model(), config()).eval()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.second = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(self.first(x)).relu())
        return y


def test_a_layer_adds_what_the_equation_says() -> None:
    torch.manual_seed(0)
    net = Net()
    model = VBLoRAModel(net, config(target_modules=["second"], vector_length=8))
    adapter = model.layer_adapters("default")["second"]
    a, b_transposed = adapter.matrices()
    x = torch.randn(3, 32)
    wanted = x @ net.second.weight.T + x @ a.T @ b_transposed
    torch.testing.assert_close(net.second(x), wanted)


class Remembering(nn.Linear):
    """A linear layer that keeps what it returned."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept: Tensor = super().forward(x)
        return self.kept


@pytest.mark.parametrize("kind", ["hook", "subclass"])
def test_an_output_that_somebody_holds_is_not_changed(kind: str) -> None:
    torch.manual_seed(0)
    net = Net()
    if kind == "subclass":
        net.first = Remembering(16, 32)
    model = VBLoRAModel(net, config(target_modules=["first"]))
    layer = net.first.base_layer
    assert isinstance(layer, nn.Linear)
    seen: list[Tensor] = []
    if kind == "hook":
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(3, 16)
    adapted = net.first(x)
    held = layer.kept if isinstance(layer, Remembering) else seen[0]
    wanted = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(held, wanted)
    assert not torch.equal(adapted, wanted)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_logits_and_bank_only(training: bool) -> None:
    model = VBLoRAModel(Net(), config(target_modules=["first", "second"]))
    model.train(training)
    F.mse_loss(model(torch.randn(4, 16)), torch.zeros(4, 16)).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(with_gradient) == 5
    assert all("logits" in name or "banks" in name for name in with_gradient)


def test_composed_matrices_are_kept_until_a_tensor_changes(model: VBLoRAModel) -> None:
    adapter = next(iter(model.layer_adapters("default").values()))
    with torch.no_grad():
        kept = adapter.matrices()
        assert adapter.matrices()[0] is kept[0]
        before = answer(model)
        model.bank().vectors.mul_(2)
        assert not torch.equal(adapter.matrices()[0], kept[0])
    assert not torch.allclose(answer(model), before)
    with torch.inference_mode():
        inside = model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits
    assert torch.isfinite(inside).all()


@pytest.mark.usefixtures("either_kernels")
@pytest.mark.parametrize("rank", [4, 3])
@torch.no_grad()
def test_a_single_row_gives_what_it_gives_among_others(rank: int) -> None:
    """Where the kernel takes a rank, a single row goes through it, and what is changed later is seen."""
    torch.manual_seed(0)
    model = get_vblora_model(nn.Sequential(nn.Linear(32, 48)), config(r=rank, target_modules=["0"]))
    model.eval()
    x = torch.randn(5, 32)
    for _ in range(2):
        with model.disable_adapter():
            base = model(x)
        together = model(x)
        assert not torch.allclose(together, base, atol=1e-3)
        assert torch.allclose(torch.cat([model(row[None]) for row in x]), together, atol=1e-5)
        assert torch.allclose(model(x[None, :1])[0], together[:1], atol=1e-5)
        model.bank("default").vectors.mul_(2)


@torch.no_grad()
def test_a_single_row_under_autocast_is_computed_in_its_dtype() -> None:
    torch.manual_seed(0)
    model = get_vblora_model(nn.Sequential(nn.Linear(32, 48)), config(r=4, target_modules=["0"])).eval()
    x = torch.randn(2, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together, alone = model(x), model(x[:1])
    assert alone.dtype == together.dtype == torch.bfloat16
    assert torch.allclose(alone.float(), together[:1].float(), atol=2e-2)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = VBLoRAModel(Net(), config(target_modules=["first"], vblora_dropout=0.5))
    x = torch.randn(2, 16)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_bfloat16_base_keeps_float32_adapters() -> None:
    model = VBLoRAModel(Net().bfloat16(), config(target_modules=["first"]))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert model(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["team.a", "keys", "a%2Eb", "x y"])
def test_names_with_dots_and_reserved_words(model: VBLoRAModel, name: str, tmp_path: Path) -> None:
    model.add_adapter(name, config(r=3))
    model.set_adapter(name)
    wanted = answer(model)
    model.save_pretrained(tmp_path, [name])
    fresh = VBLoRAModel.from_pretrained(tiny_model(), tmp_path / name, name)
    assert torch.equal(answer(fresh), wanted)
    assert fresh.active_adapters == [name]


def test_switching_adding_up_and_disabling(model: VBLoRAModel) -> None:
    alone = answer(tiny_model())
    first = answer(model)
    model.add_adapter("b", config(topk=3))
    assert torch.equal(answer(model), first)
    model.set_adapter("b")
    second = answer(model)
    model.set_adapter(["default", "b"])
    both = answer(model)
    assert not torch.allclose(first, second)
    assert not torch.allclose(both, first)
    with model.disable_adapter():
        assert torch.equal(answer(model), alone)
    assert torch.equal(answer(model), both)
    assert torch.equal(answer(model.unload()), alone)


def test_requires_grad_follows_the_active_adapter(model: VBLoRAModel) -> None:
    model.add_adapter("b", config())

    def trained() -> set[str]:
        return {
            name
            for name in model.peft_config
            for adapter in model.layer_adapters(name).values()
            if all(parameter.requires_grad for parameter in adapter.parameters())
        }

    assert trained() == {"default"}
    model.set_adapter("b")
    assert trained() == {"b"}
    assert model.bank("b").vectors.requires_grad
    assert not model.bank("default").vectors.requires_grad
    model.set_adapter("b", inference_mode=True)
    assert trained() == set()


def test_a_frozen_shared_bank_stays_frozen() -> None:
    bank = VectorBank.random(12, 16, 0.5)
    model = get_vblora_model(tiny_model(), config(), bank=bank, freeze_bank=True)
    model.add_adapter("b", config(), bank=bank)
    model.set_adapter("b")
    assert model.bank("b") is model.bank("default")
    assert not bank.vectors.requires_grad
    assert [len(group["params"]) for group in param_groups(model)] == [8]
    with pytest.raises(ConfigError, match="num_vectors"):
        model.add_adapter("c", config(num_vectors=13), bank=bank)


def test_equal_banks_are_kept_once_until_one_is_trained(tmp_path: Path) -> None:
    bank = torch.rand(24, 8) - 0.5
    for name, seed in (("a", 1), ("b", 2)):
        save_random_adapter(tmp_path / name, tiny_model(), seed=seed, bank=bank)
    save_random_adapter(tmp_path / "other", tiny_model(), seed=3)
    model = VBLoRAModel.from_pretrained(tiny_model(), tmp_path / "a", "a")
    for name in ("b", "other"):
        model.load_adapter(tmp_path / name, name)
    assert model.bank("a") is model.bank("b")
    assert model.bank("a") is not model.bank("other")
    model.set_adapter("a")  # of top-k metadata nothing is trained
    assert model.bank("a") is model.bank("b")
    model.delete_adapter("a")
    model.set_adapter("b")
    alone = VBLoRAModel.from_pretrained(tiny_model(), tmp_path / "b")
    assert torch.equal(answer(model), answer(alone))


@pytest.mark.parametrize("trained", ["default", "b"])
def test_training_on_a_lent_bank_leaves_the_other_adapter_as_it_was(
    model: VBLoRAModel, trained: str, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    loaded = VBLoRAModel.from_pretrained(tiny_model(), tmp_path)
    loaded.load_adapter(tmp_path, "b")
    assert loaded.bank("b") is loaded.bank()
    wanted = answer(model)
    loaded.set_adapter(trained)
    optimizer = torch.optim.SGD(param_groups(loaded, 1.0, 1.0))
    loaded(input_ids=torch.arange(9)[None]).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(answer(loaded), wanted)
    loaded.set_adapter("b" if trained == "default" else "default", inference_mode=True)
    assert torch.equal(answer(loaded), wanted)
    assert loaded.bank("b") is not loaded.bank()


def test_a_loaded_bank_can_stay_frozen(model: VBLoRAModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = VBLoRAModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True, freeze_bank=True)
    for _ in range(2):
        loaded.set_adapter("default")
        assert not loaded.bank().vectors.requires_grad
        assert [len(group["params"]) for group in param_groups(loaded)] == [8]


def test_composing_all_at_once_gives_the_same_gradients(model: VBLoRAModel) -> None:
    model.add_adapter("b", config(topk=3, r=1))
    model.add_adapter("c", config(), bank=model.bank("b"))
    model.set_adapter(["default", "b", "c"])
    ids = torch.arange(9)[None]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(model(input_ids=ids).logits.square().mean(), trained)
    with model.composed():
        assert all(adapter.given for adapter in model.layer_adapters("b").values())
        found = torch.autograd.grad(model(input_ids=ids).logits.square().mean(), trained)
    assert not any(adapter.given for adapter in model.layer_adapters("b").values())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_are_as_many_as_the_batch(model: VBLoRAModel) -> None:
    ids = torch.randint(VOCAB_SIZE, (4, 9))
    for names, message in ((["default"] * 2, "2 names, but the batch has 4 rows"), ("default", "must be a list")):
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, adapter_names=names)
    with pytest.raises(AdapterNameError, match="no adapter named 'nobody'"):
        model(input_ids=ids, adapter_names=["nobody"] * 4)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="adapters are merged"):
        model(input_ids=ids, adapter_names=["default"] * 4)


def test_a_layer_that_sees_some_of_the_tokens_cannot_tell_rows_apart() -> None:
    class Dropping(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1)[1:])

    model = VBLoRAModel(Dropping(), config(target_modules=["first"]))
    with pytest.raises(ConfigError, match="a layer sees 9 tokens, no multiple of the 2 rows"):
        model(torch.randn(2, 5, 16), adapter_names=["default", "__base__"])


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_generate_with_their_own_adapters(model: VBLoRAModel, beams: int) -> None:
    model.add_adapter("b", config(r=3))
    ids = torch.randint(3, VOCAB_SIZE, (3, 5))
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 2}
    names = ["b", "__base__", "default"]
    mixed = model.generate(ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            alone = model.generate(ids[row : row + 1], **options)
        assert torch.equal(mixed[row, : alone.shape[1]], alone[0])


def test_param_groups_have_their_own_rates(model: VBLoRAModel) -> None:
    model.get_submodule("model.lm_head").requires_grad_(True)
    groups = param_groups(model, 0.1, 0.2, 0.3)
    assert [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups] == [
        (8, 0.1, 0.0),
        (1, 0.2, 0.0),
        (1, 0.3, 0.0),
    ]


def test_names_that_cannot_be_used(model: VBLoRAModel, tmp_path: Path) -> None:
    for name in ("default", "", "..", "a/b", "a\0"):
        with pytest.raises(AdapterNameError):
            model.add_adapter(name, config())
    for act in (model.set_adapter, model.delete_adapter, model.bank, model.get_nb_savable_parameters):
        with pytest.raises(ValueError, match="no adapter named 'nobody'"):
            act("nobody")
    with pytest.raises(AdapterNameError):
        model.save_pretrained(tmp_path, ["nobody"])
    assert not list(tmp_path.iterdir())


def test_deleting_frees_the_bank_and_refuses_what_is_merged(model: VBLoRAModel) -> None:
    model.add_adapter("b", config())
    model.merge_adapter()
    with pytest.raises(AdapterNameError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert (model.active_adapters, list(model.peft_config), len(model.banks)) == ([], ["b"], 1)
    assert torch.equal(answer(model), answer(tiny_model()))


def test_topk_only_files_stay_sparse_and_cannot_be_trained(tmp_path: Path) -> None:
    folder = save_random_adapter(tmp_path / "a", tiny_model(), num_vectors=5000, topk=2)
    model = VBLoRAModel.from_pretrained(tiny_model(), folder)
    held = [tensor for adapter in model.layer_adapters("default").values() for tensor in adapter.buffers()]
    assert all(isinstance(adapter, TopKAdapter) for adapter in model.layer_adapters("default").values())
    assert all(tensor.shape[-1] == 2 for tensor in held)
    model.save_pretrained(tmp_path / "b")
    assert content_hash(read_adapter(tmp_path / "b")) == content_hash(read_adapter(folder))
    with pytest.raises(CheckpointError, match="cannot be trained"):
        VBLoRAModel.from_pretrained(tiny_model(), folder, is_trainable=True)
    model.set_adapter("default")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_trainable_load_goes_on_training(model: VBLoRAModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = VBLoRAModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    assert sum(parameter.requires_grad for parameter in loaded.parameters()) == 9
    assert torch.equal(answer(loaded), answer(model))


def test_files_that_do_not_fit_the_base(tmp_path: Path) -> None:
    folder = save_random_adapter(tmp_path / "a", tiny_model(), targets=["q_proj"])
    with pytest.raises(TargetError, match="no module of the base model matches"):
        VBLoRAModel.from_pretrained(tiny_model("gpt2"), folder)
    with pytest.raises(TargetError, match=r"q_proj: in 64, out 64 in the adapter, in 128, out 64 in the base"):
        VBLoRAModel.from_pretrained(tiny_model(hidden_size=128), folder)
    with pytest.raises(CheckpointError, match="no tensors for 1 modules"):
        VBLoRAModel.from_pretrained(tiny_model(num_hidden_layers=3), folder)
    with pytest.raises(CheckpointError, match="does not target 1 modules"):
        VBLoRAModel.from_pretrained(tiny_model(num_hidden_layers=1), folder)


def test_it_forwards_to_the_base_model(model: VBLoRAModel) -> None:
    assert model.config.model_type == "llama"
    out = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False, pad_token_id=2)
    assert out.shape[0] == 1
    with pytest.raises(AttributeError):
        model.does_not_exist  # noqa: B018


def test_a_copy_shares_nothing(model: VBLoRAModel) -> None:
    other = copy.deepcopy(model)
    before = answer(model)
    with torch.no_grad():
        other.bank().vectors.zero_()
    assert torch.equal(answer(model), before)
    assert not torch.allclose(answer(other), before)


def test_savable_parameters_follow_the_formula(model: VBLoRAModel, capsys: pytest.CaptureFixture[str]) -> None:
    model.add_adapter("small", config(num_vectors=300, topk=3, save_only_topk_weights=True))
    sub_vectors = 2 * 2 * (64 + 64 + 64 + 32) // 16
    assert model.get_nb_savable_parameters() == (12 * 16 + sub_vectors * 12, 0)
    assert model.get_nb_savable_parameters("small") == (300 * 16 + sub_vectors * 2 + sub_vectors * 3 // 2, 0)
    model.set_adapter("small")
    model.print_savable_parameters()
    assert capsys.readouterr().out == (
        "VB-LoRA params to-be-saved (float32-equivalent): 4,996 || total params to-be-saved: 4,996\n"
    )


def test_low_memory_start_is_on_the_meta_device() -> None:
    model = VBLoRAModel(Net(), config(target_modules=["first"]), low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in model.parameters() if parameter.requires_grad} == {"meta"}
