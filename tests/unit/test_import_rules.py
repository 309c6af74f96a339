"""Who may import whom: each folder or module imports only what its row says, wherever in a file the import stands.

Relative imports are resolved, imports inside functions and under TYPE_CHECKING count, and the most specific row wins.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vblora", "serving")
METHOD = {"vblora", "torch", "safetensors"}
CONTRACTS = {"serving.types", "serving.errors"}
HTTP = {"fastapi", "starlette", "pydantic", "pydantic_core", "anyio", "prometheus_client"}
STORE = {"serving.store", "sqlalchemy"}
GRAMMARS = {"llguidance", "cachetools"}
ANYTHING = {""}

RULES: dict[str, set[str]] = {
    "vblora": METHOD,
    "vblora/record.py": METHOD | {"matplotlib"},
    "vblora/cli": METHOD | {"typer", "rich"},
    "vblora/integrations": METHOD | {"transformers", "filelock", "jinja2", "platformdirs"},
    "serving/__init__.py": {"serving.engine"} | CONTRACTS,
    "serving/types.py": set(),
    "serving/errors.py": set(),
    "serving/settings.py": {"serving.types", "pydantic", "pydantic_settings", "yaml", "platformdirs"},
    "serving/settings_reference.py": {"serving.settings", "pydantic"},
    "serving/metrics.py": CONTRACTS | {"prometheus_client", "serving.vllm_metrics"},
    "serving/vllm_metrics.py": CONTRACTS | {"prometheus_client"},
    "serving/logs.py": {"structlog", "starlette"},
    "serving/api": CONTRACTS | HTTP | {"serving.api", "serving.tenancy"},
    "serving/engine": CONTRACTS
    | METHOD
    | GRAMMARS
    | {"serving.engine", "serving.adapters", "transformers", "tokenizers", "jinja2"},
    "serving/engine/grammar_worker.py": {"llguidance"},  # a process of its own, which starts fast and holds little
    "serving/adapters": CONTRACTS | METHOD | STORE | {"serving.adapters"},
    "serving/adapters/storage/s3.py": {"serving.adapters", "obstore"},
    "serving/tenancy": CONTRACTS | STORE | {"serving.tenancy", "cachetools"},
    "serving/tenancy/jwks.py": {"jwt", "httpx"},
    "serving/tenancy/tokens.py": CONTRACTS | {"serving.tenancy", "jwt"},
    "serving/tenancy/records.py": CONTRACTS,  # all that the API sees of it, with access.py
    "serving/tenancy/windows.py": {"limits", "redis"},
    "serving/tenancy/metering.py": CONTRACTS,  # all that the API sees of quotas and usage
    "serving/store": {"serving.store", "sqlalchemy", "alembic"},
    "serving/app.py": ANYTHING,
    "serving/listeners.py": CONTRACTS | {"uvicorn", "starlette"},
    "serving/upkeep.py": CONTRACTS | {"serving.adapters", "sqlalchemy"},
    "serving/cli.py": ANYTHING,
    "serving/adapter_cli.py": {"serving.settings", "httpx", "typer"},
    "serving/tenant_cli.py": CONTRACTS | {"serving.settings", "serving.store", "serving.tenancy", "typer"},
    "serving/demo": ANYTHING,
}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def sources() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def rule_of(source: str) -> str | None:
    """The most specific row that covers `source`."""
    rows = [row for row in RULES if source == row or source.startswith(f"{row}/")]
    return max(rows, key=len, default=None)


def imports(source: str) -> list[str]:
    """Every module that `source` (a path below the root) imports, by its full name."""
    package = Path(source).parts[:-1]
    found: list[str] = []
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            # `from serving import api` is judged as serving.api
            found += [f"{module}.{alias.name}" for alias in node.names] if module in PACKAGES else [module]
    return found


def allowed(name: str, row: str) -> bool:
    return any(not prefix or name == prefix or name.startswith(f"{prefix}.") for prefix in RULES[row])


@pytest.mark.parametrize("row", RULES)
def test_each_row_covers_something(row: str) -> None:
    assert (ROOT / row).exists(), f"{row} is gone: update RULES"


@pytest.mark.parametrize("source", sources())
def test_a_file_imports_only_what_its_row_allows(source: str) -> None:
    row = rule_of(source)
    assert row, f"no row of RULES covers {source}"
    third_party = [name for name in imports(source) if name.split(".")[0] not in sys.stdlib_module_names]
    bad = [name for name in third_party if not allowed(name, row)]
    assert not bad, f"{source} may not import {', '.join(bad)}"


@pytest.mark.parametrize("source", sources())
def test_nothing_imports_a_way_to_run_code_from_data(source: str) -> None:
    assert UNSAFE.isdisjoint(name.split(".")[0] for name in imports(source))


def test_the_rules_would_notice() -> None:
    """The rows that matter most refuse what they exist to refuse."""
    assert rule_of("vblora/integrations/base_models.py") == "vblora/integrations"
    assert not allowed("serving.types", "vblora")
    assert not allowed("transformers", "vblora")
    assert not allowed("torch", "serving/api")
    assert not allowed("serving.engine.engine", "serving/api")
    assert not allowed("sqlalchemy", "serving/api")
    assert not allowed("serving.api", "serving/engine")
    assert not allowed("serving.typesetting", "serving/api")
