"""Base models by name: folders, GGUF files converted once, and clear refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.support import save_tiny_model, tiny_model
from vblora.errors import VBLoRAError
from vblora.integrations import BaseModelError, gguf_cache
from vblora.integrations.base_models import load_base_model, resolve_dtype
from vblora.integrations.gguf_cache import STAMP, GgufSource, cache_dir, converted, demo_source, file_source

TOKENS = ["<s>", "</s>", *bytes_to_unicode().values(), "ab"]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VBLORA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer llama of 259 tokens as a float32 GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for key, value in _tiny_llama().state_dict().items():
        if key.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp keeps the halves of a rotation side by side
            value = value.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)
        stem, suffix = key.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tiny_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), tie_word_embeddings=False, **SHAPE))


def _entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"} if folder.exists() else set()


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_in_evaluation_mode_and_named_after_itself(tmp_path: Path) -> None:
    base = load_base_model(str(save_tiny_model(tmp_path / "tiny-llama")))
    assert base.base_id == "tiny-llama"
    assert not base.model.training
    assert base.model.dtype is torch.float32
    assert base.tokenizer.eos_token == "</s>"
    for name, parameter in tiny_model().named_parameters():
        assert torch.equal(base.model.get_parameter(name), parameter), name


def test_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    base = load_base_model(str(save_tiny_model(tmp_path / "m")), dtype="bfloat16")
    assert base.model.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("own", "device", "computes_bfloat16", "expected"),
    [
        ("bfloat16", "cuda", False, torch.bfloat16),
        ("float16", "cuda", False, torch.float16),
        ("bfloat16", "cpu", True, torch.bfloat16),
        ("bfloat16", "cpu", False, torch.float32),
        ("float16", "cpu", True, torch.float32),
        ("float32", "cpu", True, torch.float32),
    ],
)
def test_auto_dtype(
    own: str, device: str, computes_bfloat16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": computes_bfloat16})
    assert resolve_dtype("auto", LlamaConfig(dtype=own, **SHAPE), torch.device(device)) is expected


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(BaseModelError, match=r"lacks \d+ weights, model\.layers\.2"):
        load_base_model(str(folder))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="safetensors"):
        load_base_model(str(folder))


def test_remote_code_is_refused_and_never_runs(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": code}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nraise SystemExit")
    with pytest.raises(BaseModelError):
        load_base_model(str(folder))
    assert not (tmp_path / "canary").exists()


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="end-of-text"):
        load_base_model(str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "./no/such/folder"}, "no such folder"),
        ({"name": "no-such.gguf"}, "cannot read no-such.gguf"),
        ({"name": "{folder}", "dtype": "int3"}, "dtype must be one of auto, float32"),
        ({"name": "{folder}", "device": "warp"}, "unknown device 'warp'"),
        ({"name": "{folder}", "chat_template": "none.jinja"}, "cannot read the chat template none.jinja"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "m"))
    with pytest.raises(BaseModelError, match=message) as caught:
        load_base_model(**{key: value.replace("{folder}", folder) for key, value in arguments.items()})
    assert isinstance(caught.value, VBLoRAError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test says is missing")
def test_an_absent_cuda_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="not available"):
        load_base_model(str(save_tiny_model(tmp_path / "m")), device="cuda")


def test_a_hub_id_that_is_not_there_offline_is_a_clear_error() -> None:
    code = (
        "from vblora.integrations.base_models import BaseModelError, load_base_model\n"
        "try:\n    load_base_model('nobody/no-such-model')\n"
        "except BaseModelError as error:\n    print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("cannot load the base model 'nobody/no-such-model'")


# --- chat templates ------------------------------------------------------------------------------------------------


def test_a_chat_template_file_replaces_the_models_own(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}!")
    base = load_base_model(str(save_tiny_model(tmp_path / "m")), chat_template=template)
    assert base.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


@pytest.mark.parametrize("text", ["{{ messages[", "{{ raise_exception('no') }}"])
def test_a_broken_chat_template_fails_at_load(text: str, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(text)
    with pytest.raises(BaseModelError, match="chat template cannot be used"):
        load_base_model(str(save_tiny_model(tmp_path / "m")), chat_template=template)


def test_the_demo_template_writes_plain_lines_and_prompts_are_prefixes(tmp_path: Path) -> None:
    template = Path(gguf_cache.__file__).with_name("demo_chat_template.jinja")
    tokenizer = load_base_model(str(save_tiny_model(tmp_path / "m")), chat_template=template).tokenizer
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "yes"), ("user", "why"), ("assistant", "so")]
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == "<s>Task: be brief\nInput: hi\nOutput: yes\nInput: why\nOutput: so"
    for end in (2, 4):
        prompt = tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("\nOutput:")
        assert whole.startswith(prompt + " ")
    ends_in_an_answer = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert ends_in_an_answer.endswith("\nOutput: yes\nOutput:")


# --- GGUF ----------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_converted_once(tiny_gguf: Path, cache: Path) -> None:
    messages: list[str] = []
    base = load_base_model(str(tiny_gguf), progress=messages.append)
    assert base.base_id == "tiny"
    assert base.tokenizer.eos_token == "</s>"
    assert len(messages) == 3
    for name, parameter in _tiny_llama().named_parameters():
        assert torch.equal(base.model.get_parameter(name), parameter.bfloat16().to(base.model.dtype)), name

    messages.clear()
    load_base_model(str(tiny_gguf), progress=messages.append)
    assert messages == []
    assert _entries(cache) == {f"tiny-{hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()[:16]}"}


def test_a_file_in_parts_is_joined_and_its_sha256_checked(tiny_gguf: Path, tmp_path: Path, cache: Path) -> None:
    content = tiny_gguf.read_bytes()
    parts = tmp_path / "part0", tmp_path / "part1"
    parts[0].write_bytes(content[:1000])
    parts[1].write_bytes(content[1000:])
    source = GgufSource("joined", hashlib.sha256(content).hexdigest(), parts)
    assert AutoConfig.from_pretrained(converted(source, _silent)).vocab_size == len(TOKENS)

    parts[1].write_bytes(content[1000:-1] + b"?")
    with pytest.raises(BaseModelError, match="damaged"):
        converted(GgufSource("damaged", source.sha256, parts), _silent)
    assert _entries(cache) == {f"joined-{source.sha256[:16]}"}


def test_a_conversion_of_an_older_converter_is_made_anew(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted(file_source(tiny_gguf), _silent)
    (folder / "leftover").touch()
    monkeypatch.setattr(gguf_cache, "CONVERTER_VERSION", gguf_cache.CONVERTER_VERSION + 1)
    assert converted(file_source(tiny_gguf), _silent) == folder
    assert not (folder / "leftover").exists()
    assert json.loads((folder / STAMP).read_text())["converter_version"] == gguf_cache.CONVERTER_VERSION


@pytest.mark.parametrize("half_made", ["no stamp", "torn stamp"])
def test_a_folder_without_a_sound_stamp_is_not_trusted(half_made: str, tiny_gguf: Path) -> None:
    folder = converted(file_source(tiny_gguf), _silent)
    (folder / "config.json").write_text("{}")
    if half_made == "no stamp":
        (folder / STAMP).unlink()
    else:
        (folder / STAMP).write_text('{"source_')
    assert AutoConfig.from_pretrained(converted(file_source(tiny_gguf), _silent)).vocab_size == len(TOKENS)


def test_an_interrupted_conversion_leaves_nothing_and_the_next_succeeds(tiny_gguf: Path, cache: Path) -> None:
    def interrupt(message: str) -> None:
        if "converting" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(file_source(tiny_gguf), interrupt)
    assert _entries(cache) == set()
    assert (converted(file_source(tiny_gguf), _silent) / STAMP).exists()


def test_what_a_killed_conversion_left_is_swept_away(tiny_gguf: Path, cache: Path) -> None:
    """A killed process cannot tidy up: its staging folder stays until the next conversion, and is never used."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from vblora.integrations.gguf_cache import converted, file_source\n"
        "def die(message):\n    'converting' in message and os.kill(os.getpid(), signal.SIGKILL)\n"
        "converted(file_source(Path(sys.argv[1])), die)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tiny_gguf)], capture_output=True)
    assert result.returncode == -9
    assert [name.endswith(".partial") for name in _entries(cache)] == [True]
    folder = converted(file_source(tiny_gguf), _silent)
    assert _entries(cache) == {folder.name}


def test_two_conversions_at_once_do_the_work_once(tiny_gguf: Path) -> None:
    messages: list[str] = []
    with ThreadPoolExecutor(3) as pool:
        folders = {pool.submit(converted, file_source(tiny_gguf), messages.append) for _ in range(3)}
    assert len({future.result() for future in folders}) == 1
    assert sum("converting" in message for message in messages) == 1


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("this is no GGUF file at all, whatever its name says")
    with pytest.raises(BaseModelError, match="cannot convert this GGUF file"):
        load_base_model(str(path))
    assert _entries(cache) == set()


def test_a_cache_that_cannot_be_written_is_named(tiny_gguf: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(BaseModelError, match=r"cannot keep the converted base model in .*VBLORA_CACHE_DIR"):
        load_base_model(str(tiny_gguf))


@pytest.mark.parametrize("step", ["reading", "converting"])
def test_a_full_cache_is_named_and_leaves_nothing(step: str, tiny_gguf: Path, cache: Path) -> None:
    """A limit on the size of written files, from the named step on, stands for the full disk."""
    code = (
        "import resource, sys\n"
        "from vblora.integrations.base_models import BaseModelError, load_base_model\n"
        "def fill(message):\n"
        "    if sys.argv[2] in message:\n        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1))\n"
        "try:\n    load_base_model(sys.argv[1], progress=fill)\nexcept BaseModelError as error:\n    print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tiny_gguf), step], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(f"cannot keep the converted base model in {cache}")
    assert _entries(cache) == set()


def test_a_read_only_cache_that_holds_the_conversion_is_enough(tiny_gguf: Path, cache: Path) -> None:
    folder = converted(file_source(tiny_gguf), _silent)
    Path(f"{folder}.lock").unlink()
    cache.chmod(0o500)
    try:
        assert converted(file_source(tiny_gguf), _silent) == folder
        assert not Path(f"{folder}.lock").exists()
    finally:
        cache.chmod(0o700)


def test_the_cache_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_dir() == cache
    monkeypatch.delenv("VBLORA_CACHE_DIR")
    assert cache_dir().name == "vblora"


def test_the_demo_model_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_cache, "DEMO_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(BaseModelError, match=r"vblora\[demo\]"):
        load_base_model("demo")


def test_the_demo_model_comes_from_its_packages() -> None:
    source = demo_source()
    assert source.stem == "gemma3-270m"
    assert len(source.parts) == 4
    assert sum(part.stat().st_size for part in source.parts) > 200_000_000


def _silent(message: str) -> None:
    """A progress listener that does not care."""
