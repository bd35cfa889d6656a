"""Small runs for test_launch.py, in the processes of ``torchrun``: ``launched.py JOB:FOLDER ...``.

Killed and stopped jobs end at step 3, the job "fails" while process 0 prepares the data, and so it
is alone: the other waits for its end. Process 1 creates files with other permissions, so that a
test can tell who wrote a file.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from conftest import tiny
from peft import PeftModel
from transformers import TrainerCallback

from medquad_utils import CourseError, cli, data, machine, profiles, training
from medquad_utils.profiles import Plan

STEPS, DIES_AT = 4, 3
MAIN = os.environ.get("RANK", "0") == "0"
_settings = training.sft_config


def small(out: Path, processes: int) -> Plan:
    """27 rows packed into eight, four a step: the same rows for any number of processes."""
    plan = tiny(out, rows=27, max_steps=STEPS).with_fit(
        pack_length=256, accumulation=4 // processes
    )
    return dataclasses.replace(plan, eval_rows=4, epochs=2)


def every_step(plan: Plan, folder: Path | None = None) -> Any:
    """The plan's settings, with a line of the log for each step."""
    config = _settings(plan, folder)
    config.logging_steps = 1
    return config


class Seen(TrainerCallback):
    """Print how much of the model this process holds, and end a run that shall not finish."""

    def __init__(self, job: str) -> None:
        self.job = job

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == DIES_AT - 1:
            model = kwargs["model"]
            held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
            whole = sum(p.numel() for p in model.parameters())
            print(f"process {os.environ['RANK']} holds {held} of {whole}", flush=True)
        if state.global_step == DIES_AT and self.job == "ddp-killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == DIES_AT and self.job == "fsdp-stopped":
            raise CourseError("stopped")


def pretend_gpus() -> None:
    """Let accelerate shard on CPUs: it does so for GPUs only, though torch and gloo can."""
    from accelerate.state import DistributedType

    plain = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def run(job: str, folder: str) -> int:
    """Do one job; returns the exit status of the command."""
    if job.startswith("fsdp"):
        os.environ |= dict(line.split("=") for line in os.environ["TEST_FSDP"].split())
        pretend_gpus()
    plan = small(Path(folder), machine.processes())
    if job.startswith("fsdp"):  # as resolve says under accelerate launch
        plan = dataclasses.replace(plan, sharded=True)
    if job == "fsdp-bf16":
        plan = dataclasses.replace(plan, compute_dtype="bfloat16")
    resolve, watch, prepare = profiles.resolve, training.watch, data.prepare
    profiles.resolve = lambda *args, **kwargs: plan

    def broken(plan: Plan) -> Any:
        assert MAIN, "process 1 made data although process 0 could not"
        raise CourseError("the disk is full")

    training.watch = lambda trainer: (watch(trainer), trainer.add_callback(Seen(job)))
    data.prepare = broken if job == "fails" else prepare
    try:
        return cli.main(["train", "--profile", "tiny"])
    finally:
        profiles.resolve, training.watch, data.prepare = resolve, watch, prepare


if __name__ == "__main__":
    os.umask(0o022 if MAIN else 0o077)
    if not MAIN:
        PeftModel.save_pretrained = None  # it may not save an adapter
    torch.set_num_threads(1)
    training.sft_config = every_step
    close = PartialState.destroy_process_group
    PartialState.destroy_process_group = lambda self: None  # one group serves all jobs
    statuses = [run(*argument.split(":", 1)) for argument in sys.argv[1:]]
    print(f"process {os.environ['RANK']} ended with {statuses}", flush=True)
    close(PartialState())
