"""The walk: on every route, what is another tenant's looks to a key like what does not exist.

The same status, headers and body but for the name that the request spelled, and the same statements and calls of
storage and memory. A route that is in neither of the two tables below fails the test.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import httpx
import pytest

from serving.api.application import ROUTERS
from tests.integration.api.conftest import BASE, Files
from tests.integration.api.keyed import Keyed, keyed
from tests.recording import Recorder, recording

Route = tuple[str, str]
Request = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Names:
    """How the things of a tenant are called. Each has the length of its counterpart, and sorts at the same place."""

    adapter: str
    revision: str
    tenant: str
    key: str


UNKNOWN = Names(adapter="nobodys", revision="0123456789abcdef", tenant="nob-inc", key="0123456789abcdef")
MINE = "mine"


def spellings(names: Names) -> list[str]:
    """Every way in which a `model` field can point at another's adapter or revision."""
    return [
        names.adapter,
        f"{names.adapter}@{names.revision}",
        f"{BASE}:{names.adapter}",
        f"{BASE}:{names.adapter}@{names.revision}",
        f"{MINE}@{names.revision}",
        f"a0@{names.revision}",
        f"{names.tenant}/{names.adapter}",
        names.revision,
    ]


def naming(path: str, **body: Any) -> Callable[[Names], list[Request]]:
    """Requests that name a model in the field `model`, and in `adapter_id` where a request is answered by one."""

    def requests(names: Names) -> list[Request]:
        models = [{"model": model} for model in spellings(names)]
        if "tokenize" not in path:
            models += [{"model": BASE, "adapter_id": model} for model in spellings(names)]
            models += [{"model": names.adapter, "adapter_id": MINE}]
        return [(path, {"json": {**body, **fields}}) for fields in models]

    return requests


def streaming(path: str, **body: Any) -> Callable[[Names], list[Request]]:
    def requests(names: Names) -> list[Request]:
        return naming(path, **body)(names) + naming(path, **body, stream=True)(names)

    return requests


def below(path: str, **arguments: Any) -> Callable[[Names], list[Request]]:
    """Requests to a path made of names."""
    return lambda names: [(path.format(**vars_of(names)), arguments)]


def vars_of(names: Names) -> dict[str, str]:
    return {"adapter": names.adapter, "revision": names.revision, "tenant": names.tenant, "key": names.key}


def pages(path: str) -> Callable[[Names], list[Request]]:
    return lambda names: [(path, {"params": {"after": names.adapter}}), (path, {"params": {"after": names.tenant}})]


TENANT_BODY = {"json": {"weight": 2}}
NAMING: dict[Route, Callable[[Names], list[Request]]] = {
    ("POST", "/v1/completions"): streaming("/v1/completions", prompt="a", max_tokens=1),
    ("POST", "/v1/chat/completions"): streaming(
        "/v1/chat/completions", messages=[{"role": "user", "content": "a"}], max_tokens=1
    ),
    ("POST", "/v1/responses"): streaming("/v1/responses", input="a", max_output_tokens=1),
    ("POST", "/v1/embeddings"): naming("/v1/embeddings", input="a"),
    ("POST", "/tokenize"): naming("/tokenize", prompt="a"),
    ("POST", "/detokenize"): naming("/detokenize", tokens=[5]),
    ("GET", "/v1/models"): pages("/v1/models"),
    ("GET", "/v1/models/{model:path}"): lambda names: [(f"/v1/models/{model}", {}) for model in spellings(names)],
    ("GET", "/v1/adapters"): pages("/v1/adapters"),
    ("GET", "/v1/adapters/{name}"): below("/v1/adapters/{adapter}"),
    ("POST", "/v1/adapters/{name}/activate"): lambda names: [
        (f"/v1/adapters/{names.adapter}/activate", {"json": {"revision": names.revision}}),
        (f"/v1/adapters/{MINE}/activate", {"json": {"revision": names.revision}}),
    ],
    ("DELETE", "/v1/adapters/{name}"): below("/v1/adapters/{adapter}"),
    ("DELETE", "/v1/adapters/{name}/revisions/{revision}"): lambda names: [
        (f"/v1/adapters/{names.adapter}/revisions/{names.revision}", {}),
        (f"/v1/adapters/{MINE}/revisions/{names.revision}", {}),
    ],
    ("POST", "/v1/set_adapter"): lambda names: [
        ("/v1/set_adapter", {"json": {"adapter": model}}) for model in spellings(names)
    ],
    ("POST", "/v1/unload_lora_adapter"): lambda names: [
        ("/v1/unload_lora_adapter", {"json": {"lora_name": names.adapter}})
    ],
    ("GET", "/admin/tenants"): pages("/admin/tenants"),
    ("GET", "/admin/tenants/{name}"): below("/admin/tenants/{tenant}"),
    ("PATCH", "/admin/tenants/{name}"): below("/admin/tenants/{tenant}", **TENANT_BODY),
    ("DELETE", "/admin/tenants/{name}"): below("/admin/tenants/{tenant}"),
    ("GET", "/admin/tenants/{name}/keys"): below("/admin/tenants/{tenant}/keys"),
    ("POST", "/admin/tenants/{name}/keys"): below("/admin/tenants/{tenant}/keys"),
    ("DELETE", "/admin/tenants/{name}/keys/{id}"): below("/admin/tenants/{tenant}/keys/{key}"),
    ("GET", "/admin/usage"): lambda names: [
        ("/admin/usage", {"params": params})
        for params in ({"tenant": names.tenant}, {"adapter": f"{names.adapter}@{names.revision}"})
    ],
    ("POST", "/admin/tenants"): lambda names: [("/admin/tenants", {"json": {"name": names.tenant}})],
}
# These two succeed with a name that others use too; each has a test of its own below.
TAKING: set[Route] = {("POST", "/v1/adapters"), ("POST", "/v1/load_lora_adapter")}
NAMELESS: set[Route] = {  # a request to them can name nothing of a tenant's
    ("GET", "/health"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/docs/{asset}"),
    ("GET", "/admin/audit"),
}


@dataclass(frozen=True)
class Street:
    """The server, and the names of what the tenant `zoe-inc` has; `acme` has an adapter of its own."""

    house: Keyed
    theirs: Names
    recorder: Recorder

    def observe(self, caller: str, method: str, request: Request, names: Names) -> tuple[object, ...]:
        """All that a caller sees of the answer, and all that the server did, with the names in it left out."""
        self.recorder.lines.clear()
        path, arguments = request
        with self.house.client(caller) as client:
            reply = client.request(method, path, **arguments)
        headers = {key: value for key, value in reply.headers.items() if key not in ("date", "x-request-id")}
        return (
            reply.status_code,
            headers | {"content-length": str(len(reply.content))},
            without(names, reply.text),
            [without(names, line) for line in self.recorder.lines],
        )


def without(names: Names, text: str) -> str:
    for name in sorted(astuple(names), key=len, reverse=True):
        text = text.replace(name, "<name>")
    return text


@pytest.fixture(scope="module")
def street(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    with keyed(files, tmp_path_factory.mktemp("data"), adapter=(f"a0={files.adapter(0)}",)) as house:
        with house.client("ops") as ops:
            issued = ops.post("/admin/tenants", json={"name": "zoe-inc"}).json()["key"]
        house.keys["zoe-inc"] = issued["key"]
        with house.client("acme") as acme, house.client("zoe-inc") as zoe:
            for content in (3, 2):
                added = zoe.post("/v1/adapters", **files.upload("theirs1", content)).json()
            assert zoe.post("/v1/set_adapter", json={"adapter": "theirs1"}).status_code == 200
            assert acme.post("/v1/adapters", **files.upload(MINE, 1)).status_code == 201
        theirs = Names("theirs1", added["revision"], "zoe-inc", issued["id"])
        assert [len(name) for name in astuple(theirs)] == [len(name) for name in astuple(UNKNOWN)]
        with recording() as recorder:
            yield Street(house, theirs, recorder)


def routes() -> list[Route]:
    return sorted(
        (method, route.path)  # type: ignore[attr-defined]
        for router in ROUTERS
        for route in router.routes
        for method in route.methods  # type: ignore[attr-defined]
        if method != "HEAD"
    )


def test_every_route_is_walked() -> None:
    """Fails for a route that nobody put into one of the tables."""
    assert set(routes()) == {*NAMING, *TAKING, *NAMELESS}


@pytest.mark.parametrize("caller", ["acme", "ops"])
@pytest.mark.parametrize("route", sorted(NAMING), ids=" ".join)
def test_what_is_foreign_is_what_is_unknown(street: Street, route: Route, caller: str) -> None:
    """SECURITY.md, "names leak", and the isolation walk. Seen to fail without `owner` in `queries.visible` and in
    `queries.page`, with a second question about the adapters of others in `Registry.find`, with another wording for
    these in `catalog._visible`, and with `/admin/tenants` open to tenants."""
    method, path = route
    if caller == "ops" and path.startswith("/admin"):
        return  # tenants are an operator's to see
    asked = False
    for theirs, unknown in zip(NAMING[route](street.theirs), NAMING[route](UNKNOWN), strict=True):
        foreign = street.observe(caller, method, theirs, street.theirs)
        nothing = street.observe(caller, method, unknown, UNKNOWN)
        assert foreign == nothing
        status, calls = foreign[0], foreign[3]
        refused = path.startswith("/admin") or (caller == "acme" and "lora" in path)
        lists = method == "GET" and path in ("/v1/adapters", "/v1/models")
        assert status == (403 if refused else 200 if lists else 404)
        asked |= bool(calls)
    assert asked == (status != 403), "what is refused by its path asks nothing, all else does"


def test_another_tenants_things_are_all_still_there(street: Street) -> None:
    """After the walk, deletions and activations included."""
    with street.house.client("zoe-inc") as zoe, street.house.client("ops") as ops:
        entry = zoe.get("/v1/adapters/theirs1").json()
        assert len(entry["revisions"]) == 2
        assert (entry["active_revision"], entry["is_default"]) == (street.theirs.revision, True)
        reply = zoe.post("/v1/completions", json={"model": BASE, "prompt": "a", "max_tokens": 1})
        assert reply.headers["X-VBLoRA-Adapter"] == f"theirs1@{street.theirs.revision}"
        assert ops.get("/admin/tenants/zoe-inc").json()["weight"] == 1


@pytest.mark.parametrize("caller", ["acme", "ops"])
def test_another_tenants_default_is_nobody_elses(street: Street, caller: str) -> None:
    with street.house.client(caller) as client:
        reply = client.post("/v1/completions", json={"model": BASE, "prompt": "a", "max_tokens": 1})
        listed = [entry["name"] for entry in client.get("/v1/adapters").json()["data"]]
        models = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    assert reply.headers["X-VBLoRA-Adapter"] == "base"
    assert "theirs1" not in listed + models


def test_a_name_or_a_content_that_another_has_is_taken_like_a_new_one(street: Street, files: Files) -> None:
    """Names are each tenant's own, and that bytes are stored already shows in no answer and no statement. Fails with a
    name that must be unique over all tenants, and with 200 for whatever content is stored already."""
    with street.house.client("acme") as acme:

        def upload(name: str, content: int) -> tuple[int, list[str], list[str]]:
            street.recorder.lines.clear()
            reply = acme.post("/v1/adapters", **files.upload(name, content))
            statements = [re.split("[ (]", line)[0] for line in street.recorder.lines if not line.startswith("Local")]
            assert acme.delete(f"/v1/adapters/{name}").status_code == 204
            return reply.status_code, sorted(reply.json()), statements

        new = upload("nobodys", 4)
        assert new[0] == 201
        assert upload("theirs1", 4) == new
        assert upload("nobodys", 2) == new
    with street.house.client("ops") as ops:
        for name in ("theirs1", "nobodys"):
            body = {"lora_name": name, "lora_path": str(files.adapter(4))}
            reply: httpx.Response = ops.post("/v1/load_lora_adapter", json=body)
            assert (reply.status_code, reply.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
            assert ops.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
    test_another_tenants_things_are_all_still_there(street)
