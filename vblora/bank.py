"""The vector bank: `num_vectors` rows of `vector_length` numbers that every sub-vector of an adapter is mixed from.

Knows nothing of the logits that select from it, nor of how many adapters share it.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from vblora.checkpoint import BANK_KEY, WEIGHTS_FILE, bank_hash
from vblora.errors import CheckpointError, ConfigError
from vblora.tensorfile import load_tensors, read_bytes, write_atomically


class VectorBank(nn.Module):
    """A bank as a module: `vectors` is a float32 parameter (h, b).

    A `frozen` bank is never trained: activating an adapter leaves its `requires_grad` off. One bank may serve many
    adapters; pass the same object to each. Raises `ConfigError` unless `vectors` has two dimensions.
    """

    def __init__(self, vectors: Tensor, *, frozen: bool = False) -> None:
        super().__init__()
        if vectors.dim() != 2:
            raise ConfigError(f"a vector bank has shape (num_vectors, vector_length), not {tuple(vectors.shape)}")
        self.frozen = frozen
        self.vectors = nn.Parameter(vectors.detach().float(), requires_grad=not frozen)

    @classmethod
    def random(
        cls, num_vectors: int, vector_length: int, bound: float, *, device: torch.device | str | None = None
    ) -> VectorBank:
        """A bank uniform between -`bound` and `bound`, from torch's default random stream."""
        return cls(torch.empty(num_vectors, vector_length, device=device).uniform_(-bound, bound))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VectorBank:
        """The bank in a file of `save`, in an adapter's safetensors file, or in an adapter's folder.

        Raises `CheckpointError` where there is none, or it is not a finite float matrix.
        """
        file = Path(path)
        tensors = load_tensors(read_bytes(file / WEIGHTS_FILE if file.is_dir() else file))
        bank = tensors.get(BANK_KEY)
        if bank is None:
            raise CheckpointError(f"{BANK_KEY}: the file holds no vector bank")
        if bank.dim() != 2 or not bank.is_floating_point() or not bank.isfinite().all():
            raise CheckpointError(f"{BANK_KEY}: must be a matrix of finite floating-point numbers")
        return cls(bank)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank as a safetensors file, atomically."""
        write_atomically(Path(path), save({BANK_KEY: self.vectors.detach().cpu().contiguous()}, {"format": "pt"}))

    @property
    def hash(self) -> str:
        """64 hex digits over shape, dtype and bytes: equal banks have equal hashes."""
        return bank_hash(self.vectors)

    def extra_repr(self) -> str:
        return f"num_vectors={self.vectors.shape[0]}, vector_length={self.vectors.shape[1]}, frozen={self.frozen}"
