"""How an adapter lies in the storage: its bank, and a content that is all the rest and names that bank.

Both are safetensors files. The bank's is one that `VectorBank.load` reads. It does not know where bytes are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from vblora.checkpoint import BANK_KEY, CONFIG_FILE, adapter_tensors, bank_hash
from vblora.errors import CheckpointError
from vblora.tensorfile import load_tensors

# No tensor of an adapter has these names: they all begin as PEFT's do.
_CONFIG, _BANK_HASH = CONFIG_FILE, "bank_hash"
_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class Packed:
    """The bytes of a content and of its bank, and the hash of the bank."""

    content: bytes
    bank: bytes
    bank_hash: str


def pack(config: bytes, weights: bytes) -> Packed:
    """Take apart the two files of an adapter. Raises `CheckpointError` where the weights cannot be read or hold no
    bank."""
    tensors = adapter_tensors(weights)
    if BANK_KEY not in tensors:
        raise CheckpointError(f"{BANK_KEY}: is missing")
    bank = tensors.pop(BANK_KEY)
    digest = bank_hash(bank)
    content = {**tensors, _CONFIG: _as_tensor(config), _BANK_HASH: _as_tensor(bytes.fromhex(digest))}
    return Packed(save(content, _METADATA), save({BANK_KEY: bank}, _METADATA), digest)


def unpack_content(content: bytes) -> tuple[bytes, dict[str, Tensor], str]:
    """The configuration's file, the tensors without the bank, and the bank's hash. Raises `CheckpointError` for what is
    no content; whether it is the right one is not known here."""
    tensors = load_tensors(content)
    try:
        config, digest = (_as_bytes(tensors.pop(name)) for name in (_CONFIG, _BANK_HASH))
    except KeyError as error:
        raise CheckpointError("not a stored content") from error
    if len(digest) != 32:
        raise CheckpointError("not a stored content")
    return config, tensors, digest.hex()


def unpack_bank(bank: bytes, digest: str) -> Tensor:
    """The bank with this hash. Raises `CheckpointError` if it is another, or none."""
    tensor = load_tensors(bank).get(BANK_KEY)
    if tensor is None or bank_hash(tensor) != digest:
        raise CheckpointError("not the bank that it should be")
    return tensor


def join_bank(weights: bytes, bank: Tensor) -> bytes:
    """The weights' file as it would be with its bank. Raises `CheckpointError` where it cannot be read or has one."""
    tensors = load_tensors(weights)
    if BANK_KEY in tensors:
        raise CheckpointError(f"{BANK_KEY}: the weights hold a bank, although `bank` names one")
    return save({**tensors, BANK_KEY: bank}, _METADATA)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _as_bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
