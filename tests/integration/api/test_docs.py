"""`/docs` and the specification: nothing from elsewhere, nothing undescribed, and docs/openapi.json is up to date."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serving.api.application import build_application, specification
from serving.api.body import parse_body
from serving.api.context import Caps
from serving.api.openapi import body_model
from serving.api.operations import OPERATIONS
from serving.errors import InvalidApiKey
from serving.types import Caller
from tests.integration.api.conftest import Server

KEPT = Path(__file__).parents[3] / "docs" / "openapi.json"
RENEW = "docs/openapi.json is out of date; renew it: .venv/bin/python -m serving.api > docs/openapi.json"
ASSETS = {
    "/docs/swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "/docs/swagger-ui.css": "text/css; charset=utf-8",
    "/docs/favicon-32x32.png": "image/png",
}


class _Links(HTMLParser):
    """Where the page's tags point."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links |= {value or "" for name, value in attrs if name in {"src", "href", "action", "data"}}


@cache
def document() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(specification(version("vblora")))
    return parsed


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    reply = server.client.get("/docs")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    assert re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]+", reply.text) == []
    assert _Links(reply.text).links == set(ASSETS)
    assert '"validatorUrl": null' in reply.text
    assert "url: '/openapi.json'" in reply.text
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy and "*" not in policy


@pytest.mark.parametrize("path", ASSETS)
def test_its_parts_come_from_this_server(server: Server, path: str) -> None:
    reply = server.client.get(path)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == ASSETS[path]
    assert len(reply.content) > 500
    if path.endswith(".css"):
        assert "@import" not in reply.text
        assert {link[:5] for link in re.findall(r"url\(\s*['\"]?([^'\")]+)", reply.text)} <= {"data:"}


def test_it_is_swagger_ui_5(server: Server) -> None:
    assert re.search(r'"5\.\d+\.\d+"', server.client.get("/docs/swagger-ui-bundle.js").text)


@pytest.mark.parametrize("path", ["/docs/", "/docs/main.py", "/docs/..%2fmain.py", "/docs/__init__.py", "/docs/a/b"])
def test_nothing_else_is_below_it(server: Server, path: str) -> None:
    reply = server.client.get(path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


class _OneKey:
    """An authenticator that knows one key, a tenant's."""

    async def authenticate(self, authorization: str | None) -> Caller:
        if authorization != "Bearer of a tenant":
            raise InvalidApiKey("the key is missing or wrong")
        return Caller("customer", frozenset({"tenant"}))


@pytest.mark.parametrize("path", ["/docs", "/docs/swagger-ui.css", "/docs/nothing", "/openapi.json"])
def test_with_keys_they_are_the_operators(server: Server, path: str) -> None:
    app = build_application(replace(server.context, authenticator=_OneKey()), _no_lifespan)

    async def ask(**headers: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return (await client.get(path, headers=headers)).status_code

    assert asyncio.run(ask()) == 401
    assert asyncio.run(ask(Authorization="Bearer of a tenant")) == 403


@asynccontextmanager
async def _no_lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield


def test_the_kept_specification_is_up_to_date() -> None:
    assert KEPT.exists() and KEPT.read_text(encoding="utf-8") == specification(version("vblora")), RENEW


def test_it_is_what_the_server_answers(server: Server) -> None:
    assert server.client.get("/openapi.json").json() == document()


def test_the_specification_is_written_the_same_way_each_time() -> None:
    text = specification("1")
    assert text == specification("1")
    assert text.endswith("}\n") and not text.endswith("\n\n")
    assert json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n" == text


def test_every_operation_is_described() -> None:
    for name, operation in operations():
        assert operation["summary"] and operation["description"], name
        assert operation["tags"] and operation["operationId"] in OPERATIONS, name
        for parameter in operation.get("parameters", ()):
            assert parameter["description"] and parameter["example"], (name, parameter)
        for content in operation.get("requestBody", {}).get("content", {}).values():
            properties = content["schema"].get("properties", {"": {"examples": content.get("examples")}})
            assert any(value.get("examples") for value in properties.values()), name
        for status, response in operation["responses"].items():
            assert response["description"] and "X-Request-Id" in response["headers"], (name, status)
    assert len({operation["operationId"] for _, operation in operations()}) == len(list(operations()))
    assert set(OPERATIONS) == {operation["operationId"] for _, operation in operations()}


def test_every_operation_tells_how_it_fails() -> None:
    for name, operation in operations():
        statuses = set(operation["responses"])
        assert {"400", "413", "500"} <= statuses and not {"422", "default"} & statuses, name
        assert any(status.startswith("2") for status in statuses), name
        public = OPERATIONS[operation["operationId"]].public
        assert ({"401", "403", "503"} <= statuses) or (public and not {"401", "403"} & statuses), name
        bounded = OPERATIONS[operation["operationId"]].generating or name == "POST /v1/adapters"
        assert ("429" in statuses) == bounded, name
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorReply"}
                assert ("Retry-After" in response["headers"]) == (status in {"429", "503"})


def test_its_references_lead_somewhere() -> None:
    def check(node: Any) -> None:
        for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            check(item)
        if isinstance(node, dict) and isinstance(node.get("$ref"), str):
            target: Any = document()
            for step in node["$ref"].removeprefix("#/").split("/"):
                target = target[step]

    check(document())


def test_examples_are_bodies_that_would_be_taken() -> None:
    checked = 0
    for name, operation in operations():
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if content is not None:
            model = body_model(content["schema"]["$ref"].rpartition("/")[2])
            for example in content["examples"].values():
                assert parse_body(model, json.dumps(example["value"]).encode(), context=Caps()), name
                checked += 1
    assert checked > 10


def test_documented_statuses_are_the_real_ones(server: Server) -> None:
    """Some errors of each kind, made by a client: each has its status in the specification of its operation."""
    client = server.client
    made: list[tuple[str, httpx.Response]] = [
        ("create_completion", server.complete(model="nobody")),
        ("create_completion", server.complete(max_tokens=10_000)),
        ("create_completion", server.complete(temperature=-1)),
        ("activate_adapter", server.post("/v1/adapters/nobody/activate", {"revision": "x"})),
        ("delete_adapter", client.delete("/v1/adapters/nobody")),
        ("upload_adapter", client.post("/v1/adapters", data={"name": "x"}, files={"config": b"{", "weights": b""})),
        ("live", client.get("/health/live", headers={"Host": "example.org"})),
        ("list_models", client.get("/v1/models", headers={"Host": "example.org"})),
        ("version", client.request("GET", "/version", content=b" " * (5 << 20))),
    ]
    documented = {operation["operationId"]: operation["responses"] for _, operation in operations()}
    for operation_id, reply in made:
        examples = documented[operation_id][str(reply.status_code)]["content"]["application/json"]["examples"]
        assert reply.json()["error"]["code"] in examples, (operation_id, reply.text)
