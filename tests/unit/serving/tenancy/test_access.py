from __future__ import annotations

import asyncio

import pytest

from serving.tenancy.access import required_role
from serving.tenancy.authenticator import OpenAuthenticator


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/version"])
def test_everybody_may_ask_how_the_server_is(path: str) -> None:
    assert required_role(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/metrics",
        "/openapi.json",
        "/docs",
        "/docs/swagger-ui.css",
        "/docs/../health",
        "/admin",
        "/admin/",
        "/admin/tenants",
        "/admin/nowhere",
    ],
)
def test_operators_routes(path: str) -> None:
    assert required_role(path) == "operator"


@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/nowhere", "/health/", "/version/x", "", "/health/../v1/models", "/docsx", "/administer"],
)
def test_whatever_is_not_listed_needs_a_tenant(path: str) -> None:
    assert required_role(path) == "tenant"


def test_open_mode_has_one_caller_with_both_roles() -> None:
    callers = {asyncio.run(OpenAuthenticator().authenticate(header)) for header in (None, "Bearer x", "nonsense")}
    (caller,) = callers
    assert (caller.tenant, caller.roles) == ("default", {"tenant", "operator"})
