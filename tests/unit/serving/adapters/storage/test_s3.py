from __future__ import annotations

import pytest

from serving.adapters.storage.s3 import S3Objects
from tests.s3 import new_bucket

KEY = "contents/" + "a" * 64


def test_plain_http_is_refused_unless_the_operator_allows_it(s3_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_bucket().url
    for allowed in ("true", "1", "TRUE"):
        monkeypatch.setenv("AWS_ALLOW_HTTP", allowed)
        S3Objects(url).put(KEY, b"content")
    for refused in ("false", "", "0"):
        monkeypatch.setenv("AWS_ALLOW_HTTP", refused)
        with pytest.raises(OSError, match="S3: "):
            S3Objects(url).get(KEY)


def test_what_the_bucket_refuses_is_an_os_error(s3_server: None) -> None:
    objects = S3Objects("s3://nobodys/prefix")
    with pytest.raises(OSError, match="S3: "):
        objects.list("contents")
    with pytest.raises(OSError, match="S3: "):
        objects.put(KEY, b"content")


def test_places_with_one_beginning_are_apart(s3_server: None) -> None:
    url = new_bucket().url
    S3Objects(url).put(KEY, b"content")
    assert S3Objects(url + "0").list("contents") == {}
    assert S3Objects(url + "/").get(KEY) == b"content"
