"""Kill training with SIGKILL at random moments, resume it, and compare the adapters bit for bit.

``python tests/kills.py 50 [SEED]`` prints a line for each kill and ends with status 1 if an adapter
differs, or if a temporary file is left. Each run is a fork of this process, which has imported all
libraries, the base and the data, so a run costs seconds. A third of the runs are killed twice.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ["MEDQUAD_CACHE"] = os.devnull

import trl.trainer.sft_trainer
from conftest import tiny
from tqdm import tqdm

from medquad_utils import data, training
from medquad_utils.profiles import Plan


def plan_of(folder: Path) -> Plan:
    """Six steps of one short row each, with a checkpoint after each step."""
    plan = tiny(folder, rows=14, max_steps=6).with_fit(pack_length=256, accumulation=1)
    return dataclasses.replace(plan, eval_rows=2)


def begin(folder: Path) -> int:
    """Start a run into ``folder`` in a process of its own; returns its id."""
    assert trl.trainer.sft_trainer, "imported once, before the forks"
    if process := os.fork():
        return process
    status = 1
    try:
        with (folder / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        tqdm.set_lock(threading.RLock())  # of its own: a killed run may hold the one of all forks
        training.train(plan_of(folder))
        status = 0
    finally:
        os._exit(status)  # no clean-up of the parent's


def run(folder: Path, kill_after: float | None = None) -> float | None:
    """Run, and kill after some seconds if it lasts so long; returns its seconds if it ended."""
    if not folder.exists():
        shutil.copytree(folder.parent / "tiny" / "data", folder / "tiny" / "data")
    process, began = begin(folder), time.perf_counter()
    if kill_after is not None:
        while time.perf_counter() - began < kill_after:
            if os.waitpid(process, os.WNOHANG)[0]:
                return time.perf_counter() - began
            time.sleep(0.005)
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    killed = status == -signal.SIGKILL and kill_after is not None
    assert killed or status == 0, (folder / "log").read_text()
    return None if killed else time.perf_counter() - began


def state(folder: Path) -> str:
    """What a killed run has left: its newest checkpoint, or how far it came without one."""
    steps = sorted(path.name for path in folder.glob("tiny/checkpoints/checkpoint-*"))
    stages = ("metrics/train.json", "adapter", "checkpoints", "data/data.json", "data")
    there = [name for name in stages if (folder / "tiny" / name).exists()]
    return [*steps[-1:], *there, "nothing"][0]


def kills(count: int, seed: int, base: Path) -> Iterator[str]:
    """Yield what is wrong after each of ``count`` kills; "" if nothing is."""
    chance, whole = random.Random(seed), base / "whole"
    data.prepare(plan_of(base))
    model = training.load_base(plan_of(base))
    training.load_base = lambda plan: model  # each fork has its own copy
    seconds = run(whole) or 0.0
    weights = Path("tiny", "adapter", "adapter_model.safetensors")
    expected, done, number = (whole / weights).read_bytes(), 0, 0
    print(f"an undisturbed run takes {seconds:.1f} s", flush=True)
    while done < count:
        number += 1
        folder, left = base / f"run {number}", list[str]()
        for _ in range(2 if chance.random() < 1 / 3 else 1):
            if run(folder, chance.uniform(0.0, seconds)) is None:
                left.append(state(folder))
        run(folder)
        fault = "" if (folder / weights).read_bytes() == expected else "another adapter; "
        if parts := [p.name for p in folder.rglob(".*") if p.name.endswith((".part", ".old"))]:
            fault += f"left behind: {', '.join(parts)}"
        done += len(left)
        print(f"{done:>3} {', '.join(left) or 'not killed'}: {fault or 'equal'}", flush=True)
        yield fault


if __name__ == "__main__":
    count, seed = map(int, [*sys.argv[1:], *["50", "0"][len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory() as temporary:
        faults = [fault for fault in kills(count, seed, Path(temporary)) if fault]
    print(f"{count} kills or more: {len(faults)} runs with a fault")
    sys.exit(bool(faults))
