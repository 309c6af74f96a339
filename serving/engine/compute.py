"""The one thread that computes. Knows no models and no requests.

OpenMP keeps a pool of workers for every thread that ever ran a parallel loop. Once the pools together have more
workers than the processor has cores, a worker sleeps after each loop instead of waiting a moment for the next, and
waking it costs 60 to 100 µs: more than most of the hundreds of operations of a step. So one thread loads the model and
runs it, on all cores, and while it lives torch computes on a single core everywhere else in the process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ClassVar, TypeVar

import torch

Result = TypeVar("Result")


class ComputeThread:
    """A thread that runs jobs one after another, until `stop`. A daemon: it keeps no process alive."""

    _guard: ClassVar[threading.Lock] = threading.Lock()
    _alive: ClassVar[int] = 0
    _cores: ClassVar[int] = 0  # what torch used before the first of these threads

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        with ComputeThread._guard:
            if not ComputeThread._alive:
                ComputeThread._cores = torch.get_num_threads()
            ComputeThread._alive += 1
            self._thread.start()
            self.call(self._take_all_cores)
            torch.set_num_threads(1)  # of this thread, and of all that start from now on
        self._stopped = False

    def call(self, job: Callable[[], Result]) -> Result:
        """Run `job` on the thread and wait for it; raises what it raises."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(run)
        return future.result()

    def post(self, job: Callable[[], None]) -> None:
        """Run `job`, which must not raise, on the thread some time after the jobs before it."""
        self._jobs.put(job)

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after the jobs it has, waiting up to `timeout` seconds. After the last of these threads torch
        may use all cores again."""
        if self._stopped:
            return
        self._stopped = True
        self._jobs.put(None)
        self._thread.join(timeout)
        with ComputeThread._guard:
            ComputeThread._alive -= 1
            if not ComputeThread._alive:
                torch.set_num_threads(ComputeThread._cores)

    @staticmethod
    def _take_all_cores() -> None:
        torch.set_num_threads(ComputeThread._cores)
        torch.get_num_threads()  # a thread's first look takes over the process's number: have it before that changes

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
