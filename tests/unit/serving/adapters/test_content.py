from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest
from torch import Tensor

from serving.adapters.content import ContentLoader, check_content, read_folder, resolve_folder
from serving.adapters.storage.folder import open_folder
from serving.adapters.storage.local import LocalObjects
from serving.adapters.storage.revisions import RevisionStorage
from serving.errors import IncompatibleAdapter, InvalidAdapter, InvalidValue, StorageUnavailable
from tests.adapters import LAYOUT, adapter_files, small_checkpoint, with_config, write_files
from vblora.checkpoint import content_hash

KEY, OTHER = (content_hash(small_checkpoint(seed)) for seed in (1, 2))


def test_content_is_named_by_its_hash() -> None:
    content = check_content(*adapter_files(1), LAYOUT.compact, uploaded=True)
    assert content.content_hash == content_hash(small_checkpoint(1))
    assert (content.config, content.weights) == adapter_files(1)
    assert content.compact.rank == 2


@pytest.mark.parametrize("targets", [r"(\w+\.?)+!", "all-linear", None])
def test_an_upload_lists_its_targets(targets: str | None) -> None:
    """Seen to fail without the check of the type in `check_content`."""
    files = with_config(adapter_files(), target_modules=targets)
    with pytest.raises(InvalidAdapter, match="target_modules"):
        check_content(*files, LAYOUT.compact, uploaded=True)
    assert check_content(*files, LAYOUT.compact, uploaded=False).compact.rank == 2


@pytest.mark.parametrize(
    "files",
    [
        (b"", adapter_files()[1]),
        (b"{", adapter_files()[1]),
        (adapter_files()[0], b""),
        (adapter_files()[0], adapter_files()[1][:-1]),
        with_config(adapter_files(), topk=0),
        with_config(adapter_files(), r=3),
    ],
    ids=["no config", "not JSON", "no weights", "truncated", "topk", "shapes"],
)
def test_unsound_files_are_invalid(files: tuple[bytes, bytes]) -> None:
    with pytest.raises(InvalidAdapter):
        check_content(*files, LAYOUT.compact, uploaded=True)


@pytest.mark.parametrize(
    ("files", "field"),
    [
        (adapter_files(rank=9), "r"),
        (with_config(adapter_files(), bias="all"), "bias"),
        (with_config(adapter_files(), modules_to_save=["norm"]), "modules_to_save"),
        (with_config(adapter_files(), peft_type="LORA"), "peft_type"),
    ],
    ids=["rank", "bias", "modules_to_save", "peft_type"],
)
def test_what_does_not_fit_names_the_field(files: tuple[bytes, bytes], field: str) -> None:
    with pytest.raises(IncompatibleAdapter, match=field) as caught:
        check_content(*files, LAYOUT.compact, uploaded=True)
    assert caught.value.param == field


def test_a_folder_below_a_root_is_found_through_links(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "root" / "x", adapter_files())
    (tmp_path / "root" / "link").symlink_to(folder)
    roots = [tmp_path / "other", tmp_path / "root"]
    assert resolve_folder(str(tmp_path / "root" / "link"), roots) == folder
    assert read_folder(folder, roots) == adapter_files()


def test_a_path_outside_the_roots_is_refused_in_the_same_words(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    outside = write_files(tmp_path / "secret", adapter_files())
    write_files(tmp_path / "root-2", adapter_files())
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (root / "file").write_bytes(b"")
    paths = [
        str(outside),
        str(tmp_path / "root-2"),
        f"{root}/../secret",
        str(root / "link"),
        str(root / "loop"),
        str(root / "file"),
        str(root / "absent"),
        f"{root}/%2e%2e/secret",
        f"{root}\0",
        "/" + "a" * 5000,
        "\udcff",
        "",
        "/",
    ]
    messages = set()
    for path in paths:
        with pytest.raises(InvalidValue) as caught:
            resolve_folder(path, [root])
        assert caught.value.param == "lora_path"
        messages.add(caught.value.message)
    assert len(messages) == 1
    assert str(tmp_path) not in messages.pop()
    with pytest.raises(InvalidValue):
        resolve_folder(str(root), [])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_leads_out_of_the_roots_is_refused(tmp_path: Path, name: str) -> None:
    """Seen to fail without `_contained` in `_read_file`."""
    folder = write_files(tmp_path / "root" / "x", adapter_files())
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(InvalidAdapter, match=name) as caught:
        read_folder(folder, [tmp_path / "root"])
    assert str(tmp_path) not in caught.value.message
    assert read_folder(folder) == adapter_files()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_special_file_is_named_without_its_folder(tmp_path: Path, name: str) -> None:
    folder = write_files(tmp_path / "x", adapter_files())
    (folder / name).unlink()
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(InvalidAdapter, match=rf"{name} is missing.*never a \.bin") as caught:
        read_folder(folder)
    assert str(tmp_path) not in caught.value.message
    (folder / name).mkdir()
    with pytest.raises(InvalidAdapter, match=f"{name} is not a regular file"):
        read_folder(folder)
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    with pytest.raises(InvalidAdapter, match=f"{name} is not a regular file"):
        read_folder(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    with pytest.raises(InvalidAdapter, match=f"{name} cannot be read"):
        read_folder(folder, [tmp_path])


class SlowStorage(RevisionStorage):
    """Waits for `go` before it reads `KEY`, and counts."""

    def __init__(self, root: Path) -> None:
        super().__init__(LocalObjects(root))
        self.reads = 0
        self.reading = Event()
        self.go = Event()

    def get(self, content_hash: str) -> tuple[bytes, dict[str, Tensor]]:
        self.reads += 1
        if content_hash == KEY:
            self.reading.set()
            assert self.go.wait(10)
        return super().get(content_hash)


def test_a_content_asked_for_by_many_is_read_once_and_stalls_no_other(tmp_path: Path) -> None:
    storage = SlowStorage(tmp_path)
    storage.put(KEY, *adapter_files(1))
    storage.put(OTHER, *adapter_files(2))
    loader = ContentLoader(storage, LAYOUT.compact)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(loader.load, KEY)
        assert storage.reading.wait(10)
        asking = Barrier(8)
        others = [pool.submit(lambda: (asking.wait(10), loader.load(KEY))[1]) for _ in range(7)]
        asking.wait(10)
        time.sleep(0.2)  # from the barrier to the lock
        assert loader.load(OTHER).rank == 2
        assert not first.done()
        storage.go.set()
        loaded = first.result(10)
        again = storage.reads
        assert all(other.result(10).rank == 2 for other in others)
    assert loaded.rank == 2
    assert again == 2


def test_a_failed_load_fails_for_all_and_is_tried_again(tmp_path: Path) -> None:
    storage = open_folder(tmp_path)
    loader = ContentLoader(storage, LAYOUT.compact)
    with pytest.raises(KeyError):
        loader.load(KEY)
    storage.put(KEY, *adapter_files(2))
    with pytest.raises(InvalidAdapter, match="damaged: upload the adapter again"):
        loader.load(KEY)
    storage.put(KEY, *adapter_files(1))
    assert loader.load(KEY).rank == 2


def test_stored_content_that_does_not_fit_another_base_is_incompatible(tmp_path: Path) -> None:
    storage = open_folder(tmp_path)
    digest = content_hash(small_checkpoint(rank=9))
    storage.put(digest, *adapter_files(rank=9))
    with pytest.raises(IncompatibleAdapter):
        ContentLoader(storage, LAYOUT.compact).load(digest)


def test_a_storage_that_does_not_answer_says_nothing_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "contents" / KEY).mkdir(parents=True)
    with pytest.raises(StorageUnavailable, match="try again"):
        ContentLoader(open_folder(tmp_path), LAYOUT.compact).load(KEY)
