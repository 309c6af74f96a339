"""The demo as its user sees it, and its adapters against `transformers` and PEFT on the real base model."""

from __future__ import annotations

import copy
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel

from examples.customers.styles import STYLES
from serving.demo import CUSTOMERS, demo_adapters
from tests.e2e.conftest import Server, free_port, tool_environment
from vblora import VBLoRAModel
from vblora.integrations.base_models import BaseModel

ADAPTERS = demo_adapters()
SENTENCE = "The Golden Palace is a cheap Chinese coffee shop by the river with a low customer rating."
NEW_TOKENS = 16


def _demo(port: int, data_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("vblora-serve")), "demo", "--once", "--port", str(port)]
    return subprocess.run(
        command, env=tool_environment(COLUMNS="200"), cwd=data_dir, capture_output=True, text=True, timeout=280
    )


def test_the_demo_shows_every_adapters_answers_and_ends(tmp_path: Path) -> None:
    result = _demo(free_port(), tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("base", *ADAPTERS):
        assert f"│ {name} " in result.stdout
    assert '{"about":"' in result.stdout  # of the one that answers in JSON
    assert "matey" in result.stdout
    assert "15 requests of 5 models in one batch" in result.stdout
    assert "tokens a second" in result.stdout
    assert re.search(r"saltspoke +│ +4 │ +261,464 │ +3,796,992 │ +1,898,496", result.stdout)


def test_the_demo_says_when_its_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = _demo(port, tmp_path)
    assert result.returncode == 1
    assert f"port {port} is in use" in result.stderr


def test_the_shipped_adapters_name_no_path_of_a_machine() -> None:
    assert set(ADAPTERS) == set(CUSTOMERS) == set(STYLES)
    files = {"adapter_config.json", "adapter_model.safetensors", "training.json"}
    for folder in ADAPTERS.values():
        assert {path.name for path in folder.iterdir()} == files
        assert not re.search(r"/(root|home|tmp|work)/", (folder / "training.json").read_text())
        assert '"base_model_name_or_path": "gemma3-270m"' in (folder / "adapter_config.json").read_text()


def _chat(base: BaseModel) -> torch.Tensor:
    turns = [{"role": "user", "content": SENTENCE}]
    text = base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return torch.tensor([base.tokenizer.encode(text, add_special_tokens=False)])


@pytest.mark.parametrize("name", ADAPTERS)
def test_served_tokens_are_those_of_the_merged_model(name: str, server: Server, demo_base: BaseModel) -> None:
    merged = VBLoRAModel.from_pretrained(copy.deepcopy(demo_base.model), ADAPTERS[name]).merge_and_unload()
    prompt = _chat(demo_base)
    with torch.inference_mode():
        tokens = merged.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    expected = demo_base.tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)

    body = {"model": name, "messages": [{"role": "user", "content": SENTENCE}], "temperature": 0}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"max_tokens": NEW_TOKENS}, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == expected
    assert reply.json()["usage"]["prompt_tokens"] == prompt.shape[1]
    assert reply.headers["X-VBLoRA-Adapter"].startswith(f"{name}@")


def test_a_shipped_adapter_gives_the_same_logits_in_peft(demo_base: BaseModel) -> None:
    folder = ADAPTERS["tallywire"]
    prompt = _chat(demo_base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property by its old name
        theirs = PeftModel.from_pretrained(copy.deepcopy(demo_base.model), str(folder)).eval()
    ours = VBLoRAModel.from_pretrained(copy.deepcopy(demo_base.model), folder)
    with torch.inference_mode():
        expected, base, got = (model(prompt).logits for model in (theirs, demo_base.model, ours))
    largest = expected.abs().max()
    assert (base - expected).abs().max() > 0.1 * largest  # the adapter does something
    assert (got - expected).abs().max() <= 1e-5 * largest
