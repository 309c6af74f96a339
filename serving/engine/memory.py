"""The machine's memory: what is free, and zeros that take none until they are written. Knows not what it is for."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

MEMORY_FILE = Path("/proc/meminfo")
POPULATE_WRITE = 23  # Linux's MADV_POPULATE_WRITE, which Python does not name
PIECE_BYTES = 16 << 20  # that are committed at once
LOWEST_PRIORITY = 19


def free_memory(device: torch.device) -> int:
    """Bytes that may be taken without another program having to give any back."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = MEMORY_FILE.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def lazy_zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`, but on a CPU the system gives (zeroed) pages only when they are first written, or by `commit`.

    Writing the zeros of some GiB takes seconds, for which nobody has to wait.
    """
    number = torch.Size(shape).numel()
    if device.type != "cpu" or not number:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, number * dtype.itemsize), dtype=dtype).view(shape)


def commit(tensors: Sequence[Tensor]) -> threading.Thread:
    """Have the system give all pages of `lazy_zeros` in the background, with what is in them kept.

    So no later step waits for pages, and where they are more than the process may have it ends soon after its start,
    not at night. Gives way to all other threads, and ends early when a tensor is gone. Does nothing where the system
    cannot (other than Linux, and that before 5.14).
    """
    references = [weakref.ref(tensor) for tensor in tensors if tensor.is_cpu]
    thread = threading.Thread(target=_commit, args=(references,), name="commit-memory", daemon=True)
    thread.start()
    return thread


def _commit(references: Sequence[weakref.ref[Tensor]]) -> None:
    if sys.platform != "linux":
        return
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise  # not mmap's own, which stops all other threads meanwhile
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)  # of this thread alone
    except (AttributeError, OSError):
        return
    for reference in references:
        start = 0
        while (tensor := reference()) is not None and start < tensor.nbytes:
            size = min(PIECE_BYTES, tensor.nbytes - start)
            if madvise(ctypes.c_void_p(tensor.data_ptr() + start), ctypes.c_size_t(size), POPULATE_WRITE) != 0:
                return
            start += size
