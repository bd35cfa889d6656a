"""This machine: hardware, processes, the Hub and its token, Colab, and where results go."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medquad_utils import CourseError
from medquad_utils.memory import Shape as Shape  # part of this module's face

DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts the learner's Google Drive


@dataclass(frozen=True)
class Hardware:
    """What the machine offers. ``memory_gb`` is the memory a model can use: the card's, or the RAM of a CPU run."""

    device: str  # "cpu", "cuda" or "mps"
    name: str
    memory_gb: float
    capability: tuple[int, int] | None = None  # CUDA compute capability
    bf16_cpu: bool = False  # AVX512-BF16 or AMX: without it bf16 matrix products crawl
    cores: int = 1
    gpus: int = 0  # on this machine; a run takes one of them for each process


def processes() -> int:
    """How many processes share the run: what ``torchrun`` or ``accelerate launch`` says, 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def local_rank() -> int:
    """Which process of this machine this is, and so which GPU is its own; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def detect() -> Hardware:
    """Look at this machine. Imports torch.

    CUDA is judged by compute capability, not by ``torch.cuda.is_bf16_supported()``: that counts emulation, and a T4
    would crawl.

    Raises:
        CourseError: a launcher started more processes than there are GPUs, or CUDA had started on several GPUs before.
    """
    import psutil
    import torch

    gpus = _take_one_gpu()
    ram = psutil.virtual_memory().total / 1e9
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if torch.cuda.is_available():
        own, visible = local_rank(), torch.cuda.device_count()
        if own >= visible:
            raise CourseError(
                f"process {own} has no GPU of its own: {visible} visible. Launch as many processes as there are GPUs."
            )
        properties = torch.cuda.get_device_properties(
            own
        )  # this starts CUDA, and from here on the count is final
        if "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1:
            raise CourseError(
                "CUDA had started on several GPUs before the plan was made, and a trainer without a launcher takes one. "
                "Restart the kernel and make the plan first, or set CUDA_VISIBLE_DEVICES=0."
            )
        capability = (properties.major, properties.minor)
        return Hardware(
            "cuda", properties.name, properties.total_memory / 1e9, capability, False, cores, gpus
        )
    bf16 = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    if torch.backends.mps.is_available():
        return Hardware("mps", "Apple GPU", ram, None, False, cores)
    return Hardware("cpu", platform.processor() or platform.machine(), ram, None, bf16, cores)


def _take_one_gpu() -> int:
    """How many GPUs there are; without a launcher all but the first are hidden from this process and those it starts.

    One process trains on one GPU: on several, ``transformers`` would split every batch over them (``nn.DataParallel``),
    which TRL refuses. CUDA reads ``CUDA_VISIBLE_DEVICES`` once, when it starts, so this has to come first. All of them
    stay listed in ``MEDQUAD_GPUS``, for the lessons that ``medquad run`` starts and for a launcher started in a notebook.
    """
    import torch

    if "LOCAL_RANK" in os.environ:
        if listed := os.environ.pop("MEDQUAD_GPUS", ""):
            os.environ["CUDA_VISIBLE_DEVICES"] = listed
        return torch.cuda.device_count()
    found = torch.cuda.device_count()  # asks the driver's management library: does not start CUDA
    if found > 1:
        os.environ["MEDQUAD_GPUS"] = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            map(str, range(found))
        )
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["MEDQUAD_GPUS"].split(",")[0]
    listed = os.environ.get("MEDQUAD_GPUS", "")
    return len(listed.split(",")) if found and listed else found


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face Hub answers; ``HF_HUB_OFFLINE=1`` counts as no."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    import httpx

    try:
        httpx.head(
            os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
            timeout=timeout,
            follow_redirects=True,
        ).raise_for_status()
    except (httpx.HTTPError, OSError):
        return False
    return True


def on_colab() -> bool:
    """Whether this process is a notebook on Google Colab, which loads its own package before the first cell."""
    return "google.colab" in sys.modules


_colab_kept = ""  # why Colab did not give its secret; huggingface_hub asks once a session, and so the first answer stays


def hub_token() -> str | None:
    """The Hub token of the environment, of the Hub's own login, or of Colab's secrets; ``None`` if there is none.

    ``token_gap`` says what to do about a missing one.
    """
    import huggingface_hub

    global _colab_kept
    token: str | None = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            token = huggingface_hub.get_token()
        except Exception as error:  # only Colab's vault gets here: what it raises on a time-out is no error of the Hub's
            if not on_colab():
                raise
            _colab_kept = f"Colab's secrets do not answer ({type(error).__name__})"
            huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = (
                True  # else every download would ask, and fail, again
            )
    if any("not been granted" in str(warning.message) for warning in said):
        _colab_kept = "this notebook may not read Colab's secret HF_TOKEN: key icon > Notebook access, then Runtime > Restart session"
    return token


def token_gap() -> str:
    """Why ``hub_token`` found none, in one line with the next step; "" where nothing but the token itself is missing."""
    if _colab_kept or not on_colab():
        return _colab_kept
    return "Colab has no secret HF_TOKEN: key icon > Add new secret, with Notebook access, then Runtime > Restart session"


def default_out() -> str:
    """``$MEDQUAD_OUT``; on Colab with Drive mounted ``medquad-runs`` there; else ``runs`` at the root of the checkout around
    the working folder, or in it.

    What lies on Colab's own disk is lost with the session.
    """
    if chosen := os.environ.get("MEDQUAD_OUT"):
        return chosen
    if on_colab() and DRIVE.is_dir():
        return str(DRIVE / "medquad-runs")
    here = Path.cwd()
    root = next(
        (
            p
            for p in (here, *here.parents)
            if (p / "medquad_utils").is_dir() and (p / "pyproject.toml").is_file()
        ),
        here,
    )
    return str(root / "runs")


def _friendly_errors() -> None:
    """In a notebook, show one clear message for a ``CourseError`` and for a cell that was run out of order."""
    if "IPython" not in sys.modules or (shell := sys.modules["IPython"].get_ipython()) is None:
        return

    def handler(
        shell: Any,
        kind: type[BaseException],
        error: BaseException,
        trace: Any,
        tb_offset: int | None = None,
    ) -> list[str]:
        text = str(error)
        if isinstance(error, NameError):
            text += ". A cell above has not been run yet: choose Run > Run All Above Selected Cell, then run this one again."
        shell._showtraceback(kind, text, [f"{kind.__name__}: {text}"])
        return [text]

    shell.set_custom_exc((CourseError, NameError), handler)


def versions() -> dict[str, str]:
    """Installed versions of the packages that the course stands on."""
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")
    return {
        "python": platform.python_version(),
        **{n: importlib.metadata.version(n) for n in names},
    }
