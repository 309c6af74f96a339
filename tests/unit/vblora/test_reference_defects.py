"""The fourteen defects of PEFT 0.21.2's VB-LoRA that this implementation must not have, a test for each.

Each test runs the reference first, and shows the defect there: the assertion that follows, about ours, is the one that
the reference fails. When a later PEFT has mended one, the first half of its test fails and says so.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.vblora import VBLoRAModel as ReferenceModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bases import hyperparameters, loss, make_base, outputs
from vblora import (
    AdapterNameError,
    CheckpointError,
    VBLoRAConfig,
    VBLoRAModel,
    VectorBank,
    export_lora,
    get_vblora_model,
    read_adapter,
)
from vblora.layer import TopKAdapter

BASE = "llama"
WEIGHTS = "adapter_model.safetensors"
BANK = "base_model.vblora_vector_bank"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def values(**changes: Any) -> dict[str, Any]:
    return hyperparameters(BASE, **changes)


def reference(**changes: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(make_base(BASE), peft.VBLoRAConfig(**values(**changes))).eval()


def ours(**changes: Any) -> VBLoRAModel:
    return ours_on(make_base(BASE), **changes)


def ours_on(base: nn.Module, **changes: Any) -> VBLoRAModel:
    torch.manual_seed(0)
    return get_vblora_model(base, VBLoRAConfig(**values(**changes))).eval()


@torch.no_grad()
def answer(model: nn.Module, **arguments: Any) -> Tensor:
    return outputs(BASE, lambda **given: model(**given, **arguments))  # type: ignore[arg-type]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


class Operations(TorchDispatchMode):
    """Counts operations by name, and tensors that are made anew by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] += 1
        given = {argument.untyped_storage().data_ptr() for argument in args if isinstance(argument, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.shapes[tuple(result.shape)] += 1
        return result


@contextmanager
def counted() -> Iterator[Operations]:
    with Operations() as operations:
        yield operations


def test_01_adapter_names_are_not_ignored() -> None:
    theirs = reference(num_vectors=12)
    theirs.add_adapter("second", peft.VBLoRAConfig(**values(num_vectors=12)))
    names = ["second", "default", "__base__", "second"]
    assert torch.equal(answer(theirs, adapter_names=names), answer(theirs)), "PEFT has mended it"
    model = ours(num_vectors=12)
    model.add_adapter("second", VBLoRAConfig(**values(num_vectors=12)))
    mixed = answer(model, adapter_names=names)
    assert torch.equal(mixed[1], answer(model)[1])
    model.set_adapter("second")
    assert torch.equal(mixed[[0, 3]], answer(model)[[0, 3]])
    assert torch.equal(mixed[2], answer(make_base(BASE))[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_02_topk_only_files_in_half_precision_can_be_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = reference(save_only_topk_weights=True)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {k: v.to(dtype) if v.is_floating_point() else v for k, v in t.items()})
    with pytest.raises(RuntimeError, match="scatter"):
        peft.PeftModel.from_pretrained(make_base(BASE), tmp_path)
    found, wanted = answer(VBLoRAModel.from_pretrained(make_base(BASE), tmp_path)), answer(theirs)
    assert (found - wanted).norm() <= 2e-2 * wanted.norm()


def test_03_a_checkpoint_without_its_bank_is_refused(tmp_path: Path) -> None:
    reference().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if k != BANK})
    answers = [answer(peft.PeftModel.from_pretrained(make_base(BASE), tmp_path)) for _ in range(2)]
    assert not torch.equal(*answers), "PEFT no longer makes a bank up"
    with pytest.raises(CheckpointError, match=f"{BANK}: is missing"):
        VBLoRAModel.from_pretrained(make_base(BASE), tmp_path)


def test_04_weights_that_add_up_to_a_little_more_than_one(tmp_path: Path) -> None:
    theirs = reference(topk=3, save_only_topk_weights=True)
    theirs.save_pretrained(tmp_path)

    def rounded_up(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(name for name in tensors if name.endswith("logits_A_topk_weights"))
        tensors[name][0, 0] = torch.tensor([0.6, 0.4]) * (1 + 1e-6)
        return tensors

    rewrite(tmp_path, rounded_up)
    assert answer(peft.PeftModel.from_pretrained(make_base(BASE), tmp_path)).isnan().any(), "PEFT has mended it"
    model = VBLoRAModel.from_pretrained(make_base(BASE), tmp_path)
    assert answer(model).isfinite().all()
    mixture = next(iter(read_adapter(tmp_path).modules.values())).a
    assert mixture.weights.min() >= 0  # type: ignore[union-attr]
    assert mixture.weights.sum(-1).max() <= 1 + 1e-6  # type: ignore[union-attr]


def test_05_a_topk_only_file_stays_sparse_in_memory(tmp_path: Path) -> None:
    reference(num_vectors=5000, save_only_topk_weights=True).save_pretrained(tmp_path)
    stored = sum(t.nbytes for t in load_file(tmp_path / WEIGHTS).values())
    theirs = peft.PeftModel.from_pretrained(make_base(BASE), tmp_path)
    assert sum(p.nbytes for name, p in theirs.named_parameters() if "vblora" in name) > 5 * stored
    model = VBLoRAModel.from_pretrained(make_base(BASE), tmp_path)
    adapters = model.layer_adapters("default").values()
    assert all(isinstance(adapter, TopKAdapter) for adapter in adapters)
    held = [t for adapter in adapters for t in (*adapter.buffers(), *adapter.parameters())] + [model.bank().vectors]
    assert sum(t.nbytes for t in held) < 1.2 * stored


def test_06_matrices_are_composed_once() -> None:
    theirs, model = reference(), ours()
    layers = len(model.adapted_layers)
    with counted() as operations:
        answer(theirs)
        answer(theirs)
    assert operations.calls["aten::topk"] == 4 * layers, "PEFT composes once"
    answer(model)
    with counted() as operations:
        answer(model)
    assert operations.calls["aten::topk"] == operations.calls["aten::_embedding_bag"] == 0
    # While training each step needs its own, and all layers' can be made in one operation.
    with counted() as operations, model.train().composed():
        loss(BASE, model).backward()
    assert operations.calls["aten::_embedding_bag"] + operations.calls["aten::_embedding_bag_forward_only"] == 1


def test_07_savable_parameters_are_those_of_one_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    theirs, model = reference(), ours()
    before, wanted = theirs.get_nb_savable_parameters(), model.get_nb_savable_parameters()
    assert before == wanted
    theirs.add_adapter("second", peft.VBLoRAConfig(**values()))
    model.add_adapter("second", VBLoRAConfig(**values()))
    assert theirs.get_nb_savable_parameters() != before, "PEFT has mended it"
    assert model.get_nb_savable_parameters() == wanted
    base = make_base(BASE)
    with pytest.raises(KeyError):
        peft.get_peft_model(base, peft.VBLoRAConfig(**values()), adapter_name="only").print_savable_parameters()
    get_vblora_model(make_base(BASE), VBLoRAConfig(**values()), "only").print_savable_parameters()
    assert f"{wanted[0]:,}" in capsys.readouterr().out


def test_08_a_bank_can_be_shared_and_stays_frozen() -> None:
    theirs = reference()
    theirs.base_model.vblora_vector_bank["default"].requires_grad_(False)
    theirs.set_adapter("default")
    assert theirs.base_model.vblora_vector_bank["default"].requires_grad, "PEFT keeps it frozen"
    bank = VectorBank.random(20, 16, 0.5)
    model = get_vblora_model(make_base(BASE), VBLoRAConfig(**values()), bank=bank, freeze_bank=True)
    model.add_adapter("b", VBLoRAConfig(**values()), bank=bank)
    for name in ("default", "b", "default"):
        model.set_adapter(name)
        assert model.bank(name) is bank
        assert not bank.vectors.requires_grad
        assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["team.a", "keys"])
def test_09_any_name_and_a_swap_while_it_is_in_use(name: str, tmp_path: Path) -> None:
    with pytest.raises((KeyError, ValueError)):
        reference().add_adapter(name, peft.VBLoRAConfig(**values()))
    model = ours()
    for seed in (1, 2):
        torch.manual_seed(seed)
        get_vblora_model(make_base(BASE), VBLoRAConfig(**values())).save_pretrained(tmp_path / str(seed))
    answers = []
    for revision in ("1", "2"):
        if name in model.peft_config:
            model.delete_adapter(name)
        model.load_adapter(tmp_path / revision, name)
        model.set_adapter(name)
        answers.append(answer(model))
        assert torch.equal(answers[-1], answer(VBLoRAModel.from_pretrained(make_base(BASE), tmp_path / revision)))
    assert not torch.equal(*answers)
    model.save_pretrained(tmp_path / "saved", [name])
    assert torch.equal(
        answer(VBLoRAModel.from_pretrained(make_base(BASE), tmp_path / "saved" / name, name)), answers[1]
    )
    with pytest.raises(AdapterNameError):
        model.add_adapter(name, VBLoRAConfig(**values()))


def test_10_training_from_topk_metadata_is_refused_at_load(tmp_path: Path) -> None:
    """With k = h no logit is infinite, and the reference's guard sees nothing: it trains."""
    theirs = reference(num_vectors=3, topk=3, save_only_topk_weights=True)
    theirs.save_pretrained(tmp_path / "all")
    again = peft.PeftModel.from_pretrained(make_base(BASE), tmp_path / "all", is_trainable=True).train()
    loss(BASE, again).backward()
    reference(save_only_topk_weights=True).save_pretrained(tmp_path / "two")
    loss(BASE, peft.PeftModel.from_pretrained(make_base(BASE), tmp_path / "two", is_trainable=True).eval()).backward()
    for folder in ("all", "two"):
        with pytest.raises(CheckpointError, match="no logits and cannot be trained"):
            VBLoRAModel.from_pretrained(make_base(BASE), tmp_path / folder, is_trainable=True)
    # A full file with a logit that is not finite, wherever it is.
    ours().save_pretrained(tmp_path / "full")

    def broken(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[max(name for name in tensors if name != BANK)][-1, -1, -1] = -torch.inf
        return tensors

    rewrite(tmp_path / "full", broken)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        VBLoRAModel.from_pretrained(make_base(BASE), tmp_path / "full", is_trainable=True)


def test_11_a_compiled_or_nested_model_can_be_saved(tmp_path: Path) -> None:
    inner = peft.get_peft_model(torch.compile(make_base(BASE), backend="eager"), peft.VBLoRAConfig(**values()))
    inner.save_pretrained(tmp_path / "theirs")
    assert any("_orig_mod" in name for name in load_file(tmp_path / "theirs" / WEIGHTS)), "PEFT has mended it"
    wanted, plain = ours(), tmp_path / "plain"
    wanted.save_pretrained(plain)
    part = make_base(BASE)
    part.model.layers[0] = torch.compile(part.model.layers[0], backend="eager")  # type: ignore[union-attr, index]
    models = {
        "compiled": torch.compile(ours(), backend="eager"),
        "around": ours_on(torch.compile(make_base(BASE), backend="eager")),
        "part": ours_on(part),
        "nested": nn.ModuleDict({"inner": ours()})["inner"],
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        assert (tmp_path / name / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes(), name
        loaded = VBLoRAModel.from_pretrained(make_base(BASE), tmp_path / name)
        assert torch.equal(answer(loaded), answer(wanted))
    onto = VBLoRAModel.from_pretrained(torch.compile(make_base(BASE), backend="eager"), plain)
    assert torch.equal(answer(onto), answer(wanted))


def test_12_merging_makes_one_matrix_and_unmerging_restores_every_bit() -> None:
    def bits(model: nn.Module) -> list[Tensor]:
        return [p.clone() for name, p in model.named_parameters() if "vblora" not in name and "adapters" not in name]

    torch.manual_seed(0)
    theirs = peft.get_peft_model(make_base(BASE).bfloat16(), peft.VBLoRAConfig(**values()))
    torch.manual_seed(0)
    model = get_vblora_model(make_base(BASE).bfloat16(), VBLoRAConfig(**values()))
    for adapted, restored in ((theirs, False), (model, True)):
        before = bits(adapted)
        adapted.merge_adapter()
        assert not all(map(torch.equal, bits(adapted), before))
        adapted.unmerge_adapter()
        assert all(map(torch.equal, bits(adapted), before)) is restored
    # down_proj of two layers is the only target of its shape, (64, 128).
    with counted() as operations:
        reference().merge_adapter(safe_merge=True)
    assert operations.shapes[64, 128] >= 2 * 2
    single = ours()
    with counted() as operations:
        single.merge_adapter()
    assert operations.shapes[64, 128] == 2


def test_13_the_bank_is_initialised_once() -> None:
    with counted() as operations:
        reference()
    banks = operations.calls["aten::uniform_"]
    layers = len(ours().adapted_layers)
    with counted() as operations:
        make_base(BASE)
    own = operations.calls["aten::uniform_"]
    assert banks - own == layers, "PEFT draws one bank"
    with counted() as operations:
        ours()
    assert operations.calls["aten::uniform_"] - own == 1


def test_14_the_export_to_lora_is_exact(tmp_path: Path) -> None:
    """The reference converts through a singular value decomposition; copying A and B loses nothing."""
    model, base = ours(), make_base(BASE)
    model.save_pretrained(tmp_path / "vblora")
    export_lora(tmp_path / "vblora", tmp_path / "lora")
    wanted = answer(model)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "vblora")
    converted = _converted(theirs, tmp_path / "svd")
    exact, approximate = (
        answer(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)) for folder in (tmp_path / "lora", converted)
    )
    errors = [(found - wanted).abs().max().item() / wanted.abs().max().item() for found in (exact, approximate)]
    assert errors[0] <= 1e-6 < errors[1]


def _converted(model: peft.PeftModel, folder: Path) -> Path:
    peft.save_as_lora(folder, model, rank=2)
    return folder


def test_the_reference_is_the_one_that_the_defects_were_seen_in() -> None:
    assert peft.__version__.startswith("0.21")
    assert issubclass(ReferenceModel, nn.Module)


def test_imports_without_the_reference() -> None:
    """PEFT is the oracle of these tests, and nothing that the library needs."""
    program = "import sys; sys.modules['peft'] = None; import vblora, vblora.cli, vblora.training"
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ))
