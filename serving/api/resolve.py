"""Which adapter answers a request: the names in it → a pinned revision. Knows no HTTP.

The rule, first match wins: `adapter_id`; `model` = an adapter, or ``<base id>:<adapter>``; `model` = the base id and
the tenant has a default adapter; the base model. `model` must resolve in every case.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.errors import ModelNotFound
from serving.types import AdapterCatalog, Pin

BASE = "base"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter's name as a client writes it: ``name`` or ``name@revision``."""

    name: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Split at the last ``@``."""
        name, at, revision = text.rpartition("@")
        return cls(name, revision) if at else cls(text, None)


def parse_model(model: str, base_id: str) -> AdapterRef | None:
    """The adapter that a `model` field names, None for the base model. Whether it exists is the catalog's to say."""
    if model == base_id:
        return None
    return AdapterRef.parse(model.removeprefix(f"{base_id}:"))


def pin_adapter(catalog: AdapterCatalog, tenant: str, base_id: str, model: str, adapter_id: str | None) -> Pin | None:
    """The revision that answers, pinned; None for the base model. Reads files: run it off the event loop.

    Raises `ModelNotFound`, with the param at fault, when `model` or `adapter_id` names nothing the tenant may use.
    """
    named = parse_model(model, base_id)
    if adapter_id is None:
        return _pin_model(catalog, tenant, named)
    if named is not None:
        _pin(catalog, tenant, named, "model").release()
    if adapter_id in ("", BASE):
        return None
    return _pin(catalog, tenant, AdapterRef.parse(adapter_id), "adapter_id")


def shown_name(pin: Pin | None) -> str:
    """The value of the X-VBLoRA-Adapter header."""
    return BASE if pin is None else f"{pin.name}@{pin.revision}"


def _pin_model(catalog: AdapterCatalog, tenant: str, named: AdapterRef | None) -> Pin | None:
    if named is not None:
        return _pin(catalog, tenant, named, "model")
    try:
        return catalog.pin_default(tenant)
    except ModelNotFound as error:
        raise ModelNotFound(error.message, param="model") from error


def _pin(catalog: AdapterCatalog, tenant: str, ref: AdapterRef, param: str) -> Pin:
    try:
        return catalog.pin(tenant, ref.name, ref.revision)
    except ModelNotFound as error:
        raise ModelNotFound(error.message, param=param) from error
