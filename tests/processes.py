"""A few processes that run the cases of a module side by side, as the ranks of one group."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 240
"""What a case may take; a collective that somebody does not join ends before."""


def _serve(rank: int, ranks: int, folder: str, cases: str, pipe: Connection) -> None:
    """Run the cases that the parent names until it hangs up."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    module = importlib.import_module(cases)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            break
        # Whoever is still at it then says where, before the parent ends it.
        faulthandler.dump_traceback_later(SECONDS - 5)
        try:
            torch.manual_seed(0)
            pipe.send((True, getattr(module, name)(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


class Processes:
    """Processes that run what they are told, each of them the same."""

    def __init__(self, ranks: int, cases: str, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, ranks, str(folder), cases, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, name: str, *arguments: Any) -> list[Any]:
        """Return what each process returns of a case; raise what one of them raised."""
        for pipe in self._pipes:
            pipe.send((name, arguments))
        end = time.monotonic() + SECONDS
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                self.close()
                raise TimeoutError(f"rank {rank} is still at {name}{arguments}")
            results.append(pipe.recv())
        for rank, (done, result) in enumerate(results):
            if not done:
                raise AssertionError(f"rank {rank}, {name}{arguments}:\n{result}")
        return [result for _, result in results]

    @property
    def alive(self) -> bool:
        """Whether they still run cases."""
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()
            process.join()


@contextlib.contextmanager
def processes(ranks: int, cases: str) -> Iterator[Processes]:
    """Start processes that find one another by a file and talk on the loopback interface."""
    changed = {"GLOO_SOCKET_IFNAME": "lo"} if os.name == "posix" else {}
    before = dict(os.environ)
    os.environ.update(changed)
    os.environ.pop("TRITON_INTERPRET", None)  # importing Triton takes seconds
    with tempfile.TemporaryDirectory() as folder:
        try:
            started = Processes(ranks, cases, Path(folder))
        finally:
            os.environ.clear()
            os.environ.update(before)
        try:
            yield started
        finally:
            started.close()
