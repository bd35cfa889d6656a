"""What test_launch.py starts under ``torchrun``: ``launched.py JOB:FOLDER ...``, one small run after another in the same processes.

The jobs: ``ddp`` and ``fsdp`` train to the end, ``ddp-killed`` ends by kill -9 at step 3, ``fsdp-stopped`` by an error there,
``fails`` breaks in process 0 while the data are made. Process 1 creates files with other permissions than process 0, so that
whoever wrote a file can be told afterwards, and may not save an adapter at all (safetensors sets permissions of its own).
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from medquad_utils import launch, profiles, training
from medquad_utils.profiles import Hardware, Plan

STEPS, DIES_AT = 4, 3
_settings = training.sft_config


def small(out: Path, processes: int) -> Plan:
    """25 rows in eight packed ones, four a step: four steps in two epochs, the same rows for any number of processes."""
    plan = profiles.resolve("tiny", hardware=Hardware("cpu", "any", 16.0, cores=2), out=str(out), rows=25, max_steps=STEPS)
    return dataclasses.replace(plan, eval_rows=4, epochs=2, pack_length=256, accumulation=4 // processes)


def every_step(plan: Plan, folder: Path | None = None) -> Any:
    """The plan's settings, with a line of the log for each step."""
    config = _settings(plan, folder)
    config.logging_steps = 1
    return config


class Seen(TrainerCallback):
    """Says how much of the model this process holds, and may end it or the run."""

    def __init__(self, job: str) -> None:
        self.job = job

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == DIES_AT - 1:
            held = [getattr(p, "_local_tensor", p).numel() for p in model.parameters()]
            print(f"process {os.environ['RANK']} holds {sum(held)} of {sum(p.numel() for p in model.parameters())}", flush=True)
        if self.job == "ddp-killed" and state.global_step == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.job == "fsdp-stopped" and state.global_step == DIES_AT:
            raise profiles.CourseError("stopped")


def pretend_gpus() -> None:
    """Let accelerate shard on CPUs: it does so for GPUs only, though torch and gloo can."""
    from accelerate.state import DistributedType, PartialState

    plain = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init
    launch.settings = lambda plan: {"ddp_find_unused_parameters": False}


def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
    """In place of saving an adapter, in every process but the first."""
    raise AssertionError("process 1 saves an adapter")


def run(job: str, folder: str) -> int:
    """One job; the exit status of the command."""
    if job.startswith("fsdp"):
        os.environ |= dict(line.split("=") for line in os.environ["TEST_FSDP"].split())
        pretend_gpus()
    training.resolve = lambda *args, **kwargs: small(Path(folder), profiles.processes())
    watch, prepare = training.watch, training.prepare

    def watched(trainer: Any) -> None:
        watch(trainer)
        trainer.add_callback(Seen(job))

    def broken(plan: Plan) -> Any:
        assert launch.is_main(), "process 1 made data although process 0 could not"
        raise profiles.CourseError("the disk is full")

    training.watch, training.prepare = watched, broken if job == "fails" else prepare
    try:
        return training.main(["--profile", "tiny"])
    finally:
        training.watch, training.prepare = watch, prepare


if __name__ == "__main__":
    os.umask(0o022 if launch.is_main() else 0o077)
    if not launch.is_main():
        PeftModel.save_pretrained = refuse
    torch.set_num_threads(1)
    training.sft_config = every_step
    close, launch.close = launch.close, lambda: None
    statuses = [run(*argument.split(":", 1)) for argument in sys.argv[1:]]
    print(f"process {os.environ['RANK']} ended with {statuses}", flush=True)
    close()
