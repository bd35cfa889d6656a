"""How much system memory loading a Llama in 4 bits takes at its peak: one copy of the weights, or two?

Run it from the root of the checkout: ``python tests/benchmarks/load_memory.py --model DIR`` with a folder of
``random_llama.py`` (Linux: it reads /proc). It loads the model on the CPU in a process of its own and writes
``results/load_memory_cpu.json``.

Two numbers, for they mean different things. *Anonymous* memory is what a process has asked for: this is what runs out.
Pages of the mapped safetensors files count as resident too, up to the size of the files, but the system takes them back
when it needs room.

The arithmetic for another shape: peak of anonymous memory = libraries + packed weights + embeddings, head and norms in the
compute dtype + one tensor in flight + freed memory that the C library keeps. transformers 5.23 quantises while it loads, one
tensor after the other (core_model_loading.py: no threads when ``has_on_the_fly_quantization``), so what is in flight is one
linear layer: its copies in the files' and in the compute dtype and the quantiser's own, 13.2 bytes a weight in all (measured).
What the C library keeps grows with the layers and varies (``malloc_trim`` gives it back: no second copy of anything). So 8 B is
extrapolated from measurements: two slices of its shape, of 2 and of 4 layers with a small vocabulary, give what a layer adds;
the embeddings are arithmetic. On a GPU the weights end up on the card: what is left in system memory is the libraries and one
tensor, the largest of all.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the checkout, whatever is installed

from medquad_utils import profiles  # noqa: E402
from medquad_utils.profiles import CourseError, Shape  # noqa: E402
from medquad_utils.quantization import bits_per_parameter  # noqa: E402

PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors")
IN_FLIGHT = 13.2  # bytes for each weight of the largest linear layer while it is quantised in fp32; measured with kept=False
SLICES = (2, 4)  # layers of 8 B's width that are measured
SLICE_VOCAB = 8192
GOAL_GB = 12.0  # of system memory at 8 B: a free Colab runtime has 12.7


def status_gb() -> dict[str, float]:
    """This process's memory in GB (1e9 bytes): VmHWM (peak of all), VmRSS, RssAnon, RssFile."""
    found = re.findall(r"^(VmHWM|VmRSS|RssAnon|RssFile):\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return {name: int(kib) * 1024 / 1e9 for name, kib in found}


class PeakAnonymous:
    """The most anonymous memory this process holds while the block runs, in GB; looked at every millisecond."""

    def __enter__(self) -> PeakAnonymous:
        self.gb, self._done = status_gb()["RssAnon"], threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.gb = max(self.gb, status_gb()["RssAnon"])

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def predicted(shape: Shape, compute_bytes: int = 4) -> dict[str, float]:
    """GB of anonymous memory that loading on a CPU adds to the libraries, by part (see the head of this file)."""
    largest = max(i * o for i, o in shape.linears().values())
    return {
        "packed weights": shape.block_parameters * bits_per_parameter(double_quant=True) / 8e9,
        "embeddings, head, norms": (shape.parameters - shape.block_parameters) * compute_bytes / 1e9,
        "one tensor in flight": largest * IN_FLIGHT / 1e9,
    }


def predicted_on_gpu(shape: Shape, file_bytes: int = 2) -> dict[str, float]:
    """GB of anonymous system memory for loading onto a card: the largest tensor, once; not measured, no GPU was to be had."""
    largest = max(shape.vocab * shape.hidden, *(i * o for i, o in shape.linears().values()))
    return {"one tensor in flight": largest * file_bytes / 1e9}


def measure(folder: Path) -> dict[str, Any]:
    """Load the model of ``folder`` in NF4 in this process, which has loaded the tiny model before: its libraries are there."""
    import torch

    from medquad_utils import generation
    from medquad_utils.quantization import measured_memory

    generation.load_base(profiles.resolve("tiny"))
    plan = profiles.resolve("tiny", model_path=str(folder))
    before, started = status_gb(), time.perf_counter()
    with PeakAnonymous() as peak:
        model = generation.load_base(plan)
    seconds = time.perf_counter() - started
    shape = Shape.of(model.config)
    parts = predicted(shape, getattr(torch, plan.compute_dtype).itemsize)
    return {
        "parameters": shape.parameters,
        "files_gb": round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e9, 3),
        "compute_dtype": plan.compute_dtype,
        "libraries_gb": round(before["RssAnon"], 3),
        "weights_gb": round(sum(measured_memory(model).values()) / 1e9, 3),
        "peak_anonymous_gb": round(peak.gb, 3),
        "added_at_peak_gb": round(peak.gb - before["RssAnon"], 3),
        "added_afterwards_gb": round(status_gb()["RssAnon"] - before["RssAnon"], 3),
        "predicted_gb": {name: round(gb, 3) for name, gb in parts.items()},
        "peak_resident_gb": round(status_gb()["VmHWM"], 3),
        "seconds": round(seconds, 1),
    }


def in_a_process(folder: Path, kept: bool = True) -> dict[str, Any]:
    """``measure`` in a fresh process: a peak never falls, and what came before would count.

    Without ``kept`` the C library (glibc) gives every freed block of 64 KiB or more back at once, so that only what is alive counts.

    Raises:
        CourseError: the model does not load; carries the last line of what was said.
    """
    environment = {**os.environ, **({} if kept else {"MALLOC_MMAP_THRESHOLD_": str(2**16)})}
    command = [sys.executable, __file__, "--child", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CourseError(f"{folder.name} does not load: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def slices() -> dict[int, dict[str, Any]]:
    """Layers -> ``measure`` of a random model of 8 B's width with so few layers; the files are written and removed."""
    import random_llama

    made = {}
    for layers in SLICES:
        with tempfile.TemporaryDirectory() as folder:
            shape = dataclasses.replace(profiles.PROFILES["llama-8b"].shape, layers=layers, vocab=SLICE_VOCAB)
            made[layers] = in_a_process(random_llama.write(shape, Path(folder) / "slice"))
    return made


def extrapolated(few: dict[str, Any], more: dict[str, Any], shape: Shape, compute_bytes: int = 4) -> float:
    """GB of anonymous memory at the peak of loading ``shape`` on a CPU, libraries and all, from two of its slices.

    A layer adds what it added between the slices, at the peak or afterwards, whichever is more; the embeddings' difference is
    arithmetic.
    """
    a_layer = max(more[k] - few[k] for k in ("added_at_peak_gb", "added_afterwards_gb")) / (SLICES[1] - SLICES[0])
    embeddings = (shape.embedding_parameters - dataclasses.replace(shape, vocab=SLICE_VOCAB).embedding_parameters) * compute_bytes / 1e9
    return float(few["peak_anonymous_gb"] + (shape.layers - SLICES[0]) * a_layer + embeddings)


def report(measured: dict[str, Any], alive: dict[str, Any], sliced: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The measurements with versions, 8 B extrapolated, and how to read it."""
    shape = profiles.PROFILES["llama-8b"].shape
    reading = (
        "Anonymous memory is what runs out; resident memory counts pages of the mapped files too, which the system takes back. Peak "
        "anonymous GB on a CPU = libraries_gb + parameters of the blocks x 4.127 / 8e9 + all other parameters x bytes of the compute "
        "dtype / 1e9 + the largest linear layer x 13.2 / 1e9 + what the C library keeps of freed memory (up to 0.05 GB a layer, and "
        "not the same each time: alive.added_at_peak_gb is without it). On a GPU (not measured): libraries_gb + the largest tensor x 2 / "
        "1e9. A second copy of the weights would show as files_gb more."
    )
    return {
        "measured": measured,
        "alive": {k: alive[k] for k in ("added_at_peak_gb", "added_afterwards_gb")},
        "over_prediction_gb": round(measured["added_at_peak_gb"] - sum(measured["predicted_gb"].values()), 3),
        "slices_of_8b": sliced,
        "llama_8b": {
            "kind": "extrapolated, not measured",
            "cpu_parts_gb": {name: round(gb, 3) for name, gb in predicted(shape).items()},
            "cpu_peak_gb": round(extrapolated(*(sliced[n] for n in SLICES), shape), 2),
            "gpu_system_memory_gb": round(measured["libraries_gb"] + sum(predicted_on_gpu(shape).values()), 2),
            "goal_gb": GOAL_GB,
        },
        "reading": reading,
        "when": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder, for example of random_llama.py --profile llama-1b")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "load_memory_cpu.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.child:
            print(json.dumps(measure(options.child)))
            return 0
        if not options.model:
            raise CourseError("no model: expected --model DIR, a folder of random_llama.py.")
        from medquad_utils.data import write_json

        made = report(in_a_process(options.model), in_a_process(options.model, kept=False), slices())
        write_json(options.out, made)
    except CourseError as error:
        print(f"load_memory: {error}", file=sys.stderr)
        return 1
    print(json.dumps(made, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
