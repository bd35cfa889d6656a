"""More than one process: who goes first, who writes, what DDP and FSDP2 are told, and the accelerate configs that ship here.

Without a launcher everything here does nothing, so that one code path serves the notebook and the cluster. Under
``torchrun`` or ``accelerate launch`` process 0 prepares the data, prints, and writes; the others wait and compute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medquad_utils import CourseError
from medquad_utils.machine import processes
from medquad_utils.profiles import Plan

if TYPE_CHECKING:
    import torch

CONFIGS = {
    p.stem: p for p in sorted((Path(__file__).parent / "assets" / "accelerate").glob("*.yaml"))
}


def config(name: str) -> Path:
    """The accelerate config file ``ddp`` or ``fsdp2``, for ``accelerate launch --config_file``.

    Raises:
        CourseError: no config of that name.
    """
    if name not in CONFIGS:
        raise CourseError(f"no launch config {name!r}: expected {' or '.join(CONFIGS)}.")
    return CONFIGS[name]


def is_main() -> bool:
    """Whether this process prints and writes: process 0 of all machines, or the only one."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def main_first(plan: Plan) -> Iterator[None]:
    """The block runs in process 0, then in all others: what it writes, the others find (on several machines: one file system).

    Raises:
        CourseError: in the others, where the block failed in process 0.
    """
    if processes() == 1:
        yield
        return
    import torch.distributed
    from accelerate import PartialState

    PartialState(cpu=plan.device == "cpu")  # starts the process group as the trainer will
    done = [False]
    try:
        if is_main():
            yield
            done = [True]
    finally:
        torch.distributed.broadcast_object_list(done, src=0)
    if not is_main():
        if not done[0]:
            raise CourseError("process 0 stopped.")
        yield


def wait() -> None:
    """Until every process got here; nothing without a launcher."""
    if processes() > 1:
        import torch.distributed

        torch.distributed.barrier()


def quiet() -> None:
    """No progress bars and no notes between libraries from the processes that are not to print."""
    if is_main():
        return
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def settings(plan: Plan) -> dict[str, Any]:
    """What ``SFTConfig`` is told on top where several processes share the run.

    Every adapter gets a gradient in every step, so DDP need not look for parameters without one. It is not told that the
    graph is static: with accumulation torch 2.13 stops at an internal assertion (``expect_autograd_hooks_``).

    Raises:
        CourseError: FSDP was asked for without GPUs.
    """
    if plan.sharded and plan.device == "cpu":
        raise CourseError(
            "FSDP needs GPUs (on a CPU accelerate 1.15 leaves it out without a word): launch DDP instead."
        )
    if plan.processes == 1:
        return {}
    return {"ddp_find_unused_parameters": False}


def gathered(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Name -> whole tensor, on the CPU, of every trained parameter where FSDP cut them; ``None`` where they are whole already.

    A collective: every process has to call it.
    """
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if not any(hasattr(parameter, "full_tensor") for parameter in trained.values()):
        return None
    return {name: parameter.full_tensor().cpu() for name, parameter in trained.items()}  # type: ignore[attr-defined]


def close() -> None:
    """End the process group, so that no process waits for one that has gone."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
