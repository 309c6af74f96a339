"""What a folder and a bucket have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from serving.adapters.storage.local import LocalObjects
from serving.adapters.storage.objects import Objects, key_of
from serving.adapters.storage.s3 import S3Objects
from tests.s3 import Bucket, new_bucket

KEY, OTHER, BANK = "contents/" + "a" * 64, "contents/" + "b" * 64, "banks/" + "a" * 64


@pytest.fixture(params=["folder", "bucket"])
def bucket(request: pytest.FixtureRequest) -> Bucket | None:
    """A place in a bucket, or none: then it is a folder."""
    if request.param == "folder":
        return None
    request.getfixturevalue("s3_server")
    return new_bucket()


@pytest.fixture
def reopen(bucket: Bucket | None, tmp_path: Path) -> Callable[[], Objects]:
    """Opens one place again and again."""
    return lambda: LocalObjects(tmp_path / "deep" / "adapters") if bucket is None else S3Objects(bucket.url)


@pytest.fixture
def fill(bucket: Bucket | None, objects: Objects) -> Callable[[str], None]:
    """Puts an object there by a short way."""
    return partial(objects.put, data=b"x") if bucket is None else bucket.fill


@pytest.fixture
def objects(reopen: Callable[[], Objects]) -> Objects:
    return reopen()


def test_what_is_put_is_got_back_also_by_others(reopen: Callable[[], Objects]) -> None:
    reopen().put(KEY, b"content")
    reopen().put(OTHER, b"")
    reopen().put(BANK, b"\0" * 2**20)
    assert [reopen().get(key) for key in (KEY, OTHER, BANK)] == [b"content", b"", b"\0" * 2**20]
    assert {key: stored.bytes for key, stored in reopen().list("contents").items()} == {"a" * 64: 7, "b" * 64: 0}
    assert {key: stored.bytes for key, stored in reopen().list("banks").items()} == {"a" * 64: 2**20}


def test_what_is_put_again_takes_the_place_of_the_old_and_counts_as_new(objects: Objects) -> None:
    assert objects.modified(KEY) is None
    objects.put(KEY, b"old")
    first = objects.modified(KEY)
    assert first is not None and time.time() - 60 < first < time.time() + 1
    objects.put(KEY, b"new")
    second = objects.modified(KEY)
    assert second is not None and second >= first
    assert objects.list("contents")["a" * 64].modified == pytest.approx(second, abs=1)
    assert objects.get(KEY) == b"new"


def test_what_is_deleted_is_gone(objects: Objects) -> None:
    objects.put(KEY, b"content")
    objects.put(OTHER, b"kept")
    objects.delete(KEY)
    objects.delete(KEY)
    with pytest.raises(KeyError):
        objects.get(KEY)
    assert objects.modified(KEY) is None
    assert set(objects.list("contents")) == {"b" * 64}
    assert objects.list("banks") == {}


def test_more_than_a_page_of_objects_is_listed_whole(objects: Objects, fill: Callable[[str], None]) -> None:
    digests = {f"{number:064x}" for number in range(1100)}
    for digest in digests:
        fill(f"banks/{digest}")
    assert set(objects.list("banks")) == digests


def test_threads_may_put_get_and_delete_one_object(objects: Objects) -> None:
    def work(number: int) -> None:
        for _ in range(8):
            objects.put(KEY, b"content")
            if number % 2:
                objects.delete(KEY)
            with suppress(KeyError):
                assert objects.get(KEY) == b"content"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    objects.put(KEY, b"content")
    assert objects.get(KEY) == b"content"
    assert set(objects.list("contents")) == {"a" * 64}


@pytest.mark.parametrize("key", ["", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "a" * 63 + "\0"])
def test_only_hashes_become_paths(key: str) -> None:
    with pytest.raises(ValueError, match="64 lower-case hex digits"):
        key_of("contents", key)
