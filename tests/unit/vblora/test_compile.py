"""`torch.compile(fullgraph=True)`: the whole model in one graph, with the same answers and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.bases import BASES, hyperparameters, loss, make_base, outputs
from vblora import VBLoRAConfig, VBLoRAModel, get_vblora_model

# Inductor writes C++ and takes a while; for the other bases the graph is captured and its gradients made, not more.
BACKENDS = [*((base, "aot_eager") for base in BASES), ("linears", "inductor")]


pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # inductor's own imports


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(base: str) -> VBLoRAModel:
    return get_vblora_model(make_base(base), VBLoRAConfig(**hyperparameters(base)))


@pytest.mark.parametrize(("base", "backend"), BACKENDS)
def test_training_and_inference_in_one_graph(base: str, backend: str) -> None:
    model = adapted(base)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found, wanted = loss(base, compiled), loss(base, model)
    torch.testing.assert_close(found, wanted)
    for mine, eager in zip(*(torch.autograd.grad(value, trained) for value in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, eager)
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(outputs(base, compiled), outputs(base, model))


def test_a_compiled_model_follows_a_switch_of_adapters() -> None:
    model = adapted("linears").eval()
    model.add_adapter("b", VBLoRAConfig(**hyperparameters("linears", r=2)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    answers = []
    with torch.no_grad():
        for name in ("default", "b", "default"):
            model.set_adapter(name)
            answers.append(outputs("linears", compiled))
            assert torch.equal(answers[-1], outputs("linears", model))
        assert not torch.equal(answers[0], answers[1])
        model.bank("default").vectors.mul_(2)
        assert torch.equal(outputs("linears", compiled), outputs("linears", model))
        assert not torch.equal(outputs("linears", compiled), answers[0])
