"""What the benchmarks share: the machine, results as JSON, and figures in README.md."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch

from medquad_utils import files

sys.path.append(str(Path(__file__).parent.parent))
from stamp import write_between

RESULTS = files.MEASURED  # the package reads some of them
README = Path(__file__).parent / "README.md"
PACKAGES = ("accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "trl")


def record() -> dict[str, Any]:
    """Describe date, device, machine and versions, without names of people or hosts."""
    cuda = torch.cuda.is_available()
    machine = {
        "device": torch.cuda.get_device_name(0) if cuda else "CPU",
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "",
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    return {"date": datetime.now(UTC).date().isoformat(), "machine": machine}


def status_gb(name: str) -> float:
    """Return a figure of this process from Linux in GB (1e9 bytes), such as RssAnon or VmHWM."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE)[0]) * 1024 / 1e9


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that one call takes, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without paths, for a cell of a table."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"(?:/[\w.+-]+){2,}", "(path)", text).replace("|", "/")[:200]


class PlayedKernel(torch.autograd.Function):
    """torch's variable-length kernel on a CPU, which keeps what the kernel keeps for backward."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, starts: Any, scale: float) -> Any:
        out = each_alone(query, key, value, starts, scale)
        log_sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, starts, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # type: ignore[override]
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors[:3]]
        with torch.enable_grad():
            out = each_alone(*inputs, ctx.saved_tensors[3], ctx.scale)
        return *torch.autograd.grad(out, inputs, gradient), None, None


def each_alone(query: Any, key: Any, value: Any, starts: Any, scale: float) -> Any:
    """Attend within each example; (tokens, heads, size) in and out."""
    sdpa, settings = torch.nn.functional.scaled_dot_product_attention, {"enable_gqa": True}
    parts = []
    for begin, end in pairwise(starts.tolist()):
        q, k, v = (t[begin:end].transpose(0, 1)[None] for t in (query, key, value))
        parts.append(sdpa(q, k, v, is_causal=True, scale=scale, **settings)[0].transpose(0, 1))
    return torch.cat(parts)


@contextmanager
def varlen_on_cpu() -> Iterator[list[int]]:
    """Play the kernel where there is no GPU; the list gets the number of examples of each call."""
    calls: list[int] = []

    def varlen_attn(q: Any, k: Any, v: Any, starts: Any, *others: Any, **settings: Any) -> Any:
        assert settings["window_size"] == (-1, 0) and settings["enable_gqa"]
        longest = int(starts.diff().max())
        assert others[0] is starts and others[1:] == (longest, longest)
        calls.append(len(starts) - 1)
        return PlayedKernel.apply(q, k, v, starts, settings["scale"])

    with patch("torch.nn.attention.varlen.varlen_attn", varlen_attn):
        yield calls


def read_results(script: str, folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Read device -> profile -> run from the JSON files of ``script``."""
    files = sorted(folder.glob(f"{script}_*.json"))
    return {file.stem.removeprefix(f"{script}_"): json.loads(file.read_text()) for file in files}


def save(script: str, profile: str, run: dict[str, Any], folder: Path = RESULTS) -> None:
    """Put the run into its device's JSON file, beside the runs of other profiles."""
    device = re.sub(r"\W+", "_", run["machine"]["device"].lower())
    runs = read_results(script, folder).get(device, {})
    files.write_json(folder / f"{script}_{device}.json", runs | {profile: run})


def table(head: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; short rows are filled up with empty cells."""
    names = head.split("|")
    filled = [[*row, *[""] * (len(names) - len(row))] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *filled)]


def about(profile: str, run: dict[str, Any]) -> str:
    """Say where, when and with which versions a run was measured."""
    host = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in host["packages"].items())
    return (
        f"**{profile}** on {host['device']}: {run['date']}, {host['cpus']} CPU cores, "
        f"{host['memory_gib']} GiB, {host['system']}, Python {host['python']}, {versions}."
    )


def marks(script: str) -> tuple[str, str]:
    """Return what README.md has before and after the figures of ``script``."""
    return f"<!-- {script}.py writes these figures -->", f"<!-- end of {script}.py -->"


def write_readme(script: str, figures: str) -> None:
    """Replace the figures of ``script`` in README.md."""
    write_between(README, marks(script), figures)
