"""How much system memory loading a Llama in 4 bits takes at its peak: one copy, or two?

    python tests/benchmarks/load_memory.py     # Linux, some minutes

It loads random models on the CPU, each in a process of its own. README.md says what is counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import random_llama
import torch

from medquad_utils import files, generation
from medquad_utils.profiles import PROFILES, Shape, resolve
from medquad_utils.quantization import bits_per_parameter, measured_memory

# Bytes a weight of the largest linear layer while it is quantised in fp32: transformers 5.23
# quantises one tensor after the other, with copies in the file's and in the compute dtype.
IN_FLIGHT = 13.2
BIG = PROFILES["llama-8b"].shape
SLICES = {layers: dataclasses.replace(BIG, layers=layers, vocab=8192) for layers in (2, 4)}
SMOKE = Shape(1024, 4, 2816, 8, 4, 3072, tied=True)
RECORD = common.RESULTS / "load_memory_cpu.json"


@contextmanager
def anonymous_gb() -> Iterator[list[float]]:
    """Collect, every millisecond, the GB of anonymous memory that this process holds."""
    done, seen = threading.Event(), [common.status_gb("RssAnon")]

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(common.status_gb("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield seen
    done.set()
    thread.join()


def predicted(shape: Shape, compute_bytes: int = 4) -> dict[str, float]:
    """Return the GB of anonymous memory that loading on a CPU adds to the libraries, by part."""
    largest = max(i * o for i, o in shape.linears().values())
    others = shape.parameters - shape.block_parameters
    packed = shape.block_parameters * bits_per_parameter(double_quant=True) / 8
    names = "packed weights", "embeddings, head, norms", "one tensor in flight"
    parts = zip(names, (packed, others * compute_bytes, largest * IN_FLIGHT), strict=True)
    return {name: round(size / 1e9, 3) for name, size in parts}


def measure(folder: Path) -> dict[str, Any]:
    """Load the model of ``folder`` in NF4, after the tiny model has brought in the libraries."""
    generation.load_base(resolve("tiny"))
    plan = resolve("tiny", model=str(folder))
    with anonymous_gb() as seen:
        model = generation.load_base(plan)
    after, shape = common.status_gb("RssAnon"), Shape.of(model.config)
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    sizes = {
        "files_gb": files / 1e9, "libraries_gb": seen[0],
        "weights_gb": sum(measured_memory(model).values()) / 1e9, "peak_anonymous_gb": max(seen),
        "added_at_peak_gb": max(seen) - seen[0], "added_afterwards_gb": after - seen[0],
    }  # fmt: skip
    parts = predicted(shape, getattr(torch, plan.compute_dtype).itemsize)
    rounded = {name: round(gb, 3) for name, gb in sizes.items()}
    return {"parameters": shape.parameters, **rounded, "predicted_gb": parts}


def load_apart(shape: Shape, kept: bool = True) -> dict[str, Any]:
    """Measure a random model in a fresh process, because a peak never falls.

    Without ``kept`` the C library gives freed blocks back at once: only what is alive counts.
    """
    environment = os.environ | ({} if kept else {"MALLOC_MMAP_THRESHOLD_": str(2**16)})
    with tempfile.TemporaryDirectory() as place:
        folder = random_llama.write(shape, Path(place) / "model")
        command = [sys.executable, __file__, "--child", str(folder)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def extrapolated(few: dict[str, Any], more: dict[str, Any]) -> float:
    """Return the GB at the peak of loading 8 B on a CPU in fp32, libraries included.

    A layer adds what it added between the slices; the larger vocabulary is arithmetic.
    """
    smallest, largest = SLICES
    keys = ("added_at_peak_gb", "added_afterwards_gb")
    layer = max(more[key] - few[key] for key in keys) / (largest - smallest)
    embeddings = BIG.embedding_parameters - SLICES[smallest].embedding_parameters
    added = (BIG.layers - smallest) * layer + embeddings * 4 / 1e9
    return round(few["peak_anonymous_gb"] + added, 2)


def report() -> dict[str, Any]:
    """Measure a model of Llama-3.2-1B's shape and extrapolate to 8 B."""
    measured, alive = (load_apart(PROFILES["llama-1b"].shape, kept) for kept in (True, False))
    slices = {layers: load_apart(shape) for layers, shape in SLICES.items()}
    beside_gpu = measured["libraries_gb"] + BIG.vocab * BIG.hidden * 2 / 1e9  # the largest tensor
    return common.record() | {
        "measured": measured, "slices_of_8b": slices,
        "alive": {key: alive[key] for key in ("added_at_peak_gb", "added_afterwards_gb")},
        "llama_8b": {
            "kind": "extrapolated, not measured",
            "cpu_parts_gb": predicted(BIG), "cpu_peak_gb": extrapolated(*slices.values()),
            "gpu_system_memory_gb": round(beside_gpu, 2),
        },
    }  # fmt: skip


def page(record: dict[str, Any]) -> str:
    """Return the figures for README.md."""
    one, big, alive = record["measured"], record["llama_8b"], record["alive"]["added_at_peak_gb"]
    return (
        f"- Llama-3.2-1B's shape, measured: {one['files_gb']:.2f} GB of files become "
        f"{one['weights_gb']:.2f} GB of weights. Loading adds {one['added_at_peak_gb']:.2f} GB "
        f"at its peak, {alive:.2f} GB of them alive.\n"
        f"- Llama-3-8B's shape, extrapolated: {big['cpu_peak_gb']:.1f} GB at the peak on a CPU, "
        f"{big['gpu_system_memory_gb']:.1f} GB beside a GPU."
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns what was measured."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small model; writes nothing")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child or options.smoke:
        return measure(options.child) if options.child else load_apart(SMOKE, kept=False)
    record = report()
    files.write_json(RECORD, record)
    common.write_readme("load_memory", page(record))
    return record


if __name__ == "__main__":
    print(json.dumps(main()))
