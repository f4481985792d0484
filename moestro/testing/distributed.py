"""Run a function on several ranks of this machine, for tests."""

import importlib.util
import inspect
import os
import queue
import socket
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes


TIMEOUT_SECONDS = 120.0


def run_distributed(
    function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = TIMEOUT_SECONDS
) -> list[Any]:
    """Call ``function(rank, world_size, *arguments)`` in ``ranks`` fresh processes joined by gloo.

    Args:
        function: at module level of a file; each process imports that file anew. Results must be plain Python values.
        timeout: seconds for all; a hang is an error, not a wait.

    Returns:
        The results in order of rank.

    Raises:
        AssertionError: a rank failed (its traceback is in the message) or did not end in time.
    """
    file = inspect.getfile(function)
    context = processes.get_context("spawn")
    results = context.Queue()
    port = _free_port()
    workers = [
        context.Process(target=_work, args=(file, function.__qualname__, rank, ranks, port, results, arguments))
        for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    try:
        found: dict[int, Any] = {}
        for _ in workers:
            try:
                rank, value, failure = results.get(timeout=timeout)
            except queue.Empty:
                missing = sorted(set(range(ranks)) - set(found))
                raise AssertionError(f"ranks {missing} gave no answer in {timeout:g} s") from None
            if failure is not None:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            found[rank] = value
        for worker in workers:
            worker.join(timeout)
        return [found[rank] for rank in range(ranks)]
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
        results.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _module(file: str) -> ModuleType:
    """The module of a file, whether or not its folder is on the path."""
    spec = importlib.util.spec_from_file_location("run_distributed_function", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _work(file: str, name: str, rank: int, ranks: int, port: int, results: Any, arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        value = getattr(_module(file), name)(rank, ranks, *arguments)
        dist.barrier()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
