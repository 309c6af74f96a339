"""Which role a path asks for: data, read before a body is. Knows no HTTP library and no callers."""

from __future__ import annotations

from serving.types import Role

PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/version"})
OPERATOR_PATHS = frozenset(
    {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics", "/openapi.json", "/docs", "/admin"}
)
OPERATOR_FOLDERS = ("/docs/", "/admin/")


def required_role(path: str) -> Role | None:
    """The role that may use `path`, None for everybody. Unknown paths are a tenant's, so that a route which nobody
    listed here is never public."""
    if path in PUBLIC_PATHS:
        return None
    return "operator" if path in OPERATOR_PATHS or path.startswith(OPERATOR_FOLDERS) else "tenant"
