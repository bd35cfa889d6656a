"""This machine: hardware, processes, the Hub and its token, Colab, the results folder."""

from __future__ import annotations

import errno
import functools
import gc
import importlib.metadata
import io
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import timeit
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medquad_utils import STOPPED, CourseError
from medquad_utils.atomic import reason
from medquad_utils.files import user_path

DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts the learner's Google Drive
KAGGLE = Path("/kaggle/working")  # what Kaggle keeps of a session: "Save Version"


@dataclass(frozen=True)
class Hardware:
    """What the machine offers; ``memory_gb`` is the card's memory, or the RAM of a CPU run."""

    device: str  # "cpu" or "cuda"; 4-bit training has no kernels for a Mac's GPU
    name: str
    memory_gb: float
    capability: tuple[int, int] | None = None  # CUDA compute capability
    bf16_cpu: bool = False  # matrix products are faster in bf16 than in fp32
    cores: int = 1
    gpus: int = 0  # on this machine; a run takes one for each process

    def __str__(self) -> str:
        name = self.name if self.device == "cuda" else f"CPU, {self.cores} cores"
        return f"{name}, {self.memory_gb:.0f} GB"


def guarded(work: Callable[[], int]) -> int:
    """Run a command and return its exit status; whatever goes wrong is one line on stderr.

    An error that nobody foresaw leaves its traceback in a log in the folder for temporary files.
    """
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # a service closed it
            setattr(sys, name, io.StringIO())
        elif isinstance(stream, io.TextIOWrapper):  # ASCII cannot write a dash
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            _ = processes(), local_rank()  # a launcher's variables, before a library reads them
            status = work()
        except SystemExit as stop:  # argparse: --help
            status = int(stop.code or 0)
        sys.stdout.flush()  # a closed pipe or a full disk shows here, not after the last line
        return status
    except BrokenPipeError:  # head or less has read enough
        message, status = "", 141
    except KeyboardInterrupt:
        message, status = STOPPED, 130
    except Exception as error:
        message, status = _told(error), 1
    first = not os.environ.get("LOCAL_RANK", "0").strip("0").isdecimal()  # of several processes
    if message and first:
        print(f"medquad: {' '.join(message.split())}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # send the rest nowhere: Python would fail once more at its exit
        with suppress(OSError, ValueError):  # no file behind it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _told(error: Exception) -> str:
    """Describe an error that ended a command in one line, with the next step."""
    if isinstance(error, CourseError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):  # an extra that is not installed
        return f"{error.name} is not installed. Run make course, or pip install -e '.[all]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{Path(os.fsdecode(error.filename)).name}: {reason(error)}"
    about_network = re.search(r"(?i)\bprox|socks|certificat|\bssl|\burl|no such file", str(error))
    if about_network and (steering := network_settings()):
        return f"{_first_line(error)} ({steering}). Correct or unset it, if it is to blame."
    if isinstance(error, OSError) and error.errno:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return reason(error) if full else f"{error.strerror}."
    log = Path(tempfile.gettempdir()) / "medquad-qlora-error.log"
    with suppress(OSError):
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return (
        f"unexpected {_first_line(error)}. Please report it with {log.name}, from the folder for "
        "temporary files."
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {[*str(error).strip().splitlines(), 'no message'][0][:200]}"


def _number(name: str, default: int) -> int:
    if not (text := os.environ.get(name) or str(default)).isdecimal():
        raise CourseError(f"{name}={text!r}: expected a whole number, as a launcher sets it.")
    return int(text)


def processes() -> int:
    """Return how many processes share the run: set by ``torchrun`` or ``accelerate launch``."""
    return _number("WORLD_SIZE", 1) if "LOCAL_RANK" in os.environ else 1


def local_rank() -> int:
    """Return the number of this process on this machine, and so of its GPU; 0 if alone."""
    return _number("LOCAL_RANK", 0)


def detect() -> Hardware:
    """Look at this machine, and take one GPU of several (``take_one_gpu``)."""
    import psutil
    import torch

    gpus = take_one_gpu()
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if not torch.cuda.is_available():
        name, ram = platform.processor() or platform.machine(), psutil.virtual_memory().total / 1e9
        bf16 = sys.platform != "darwin" and fast_bf16()  # never tried on a Mac
        return Hardware("cpu", name, ram, None, bf16, cores)
    own, visible = local_rank(), torch.cuda.device_count()
    if own >= visible:
        raise CourseError(
            f"process {own} has no GPU of its own: {visible} visible. "
            "Launch as many processes as there are GPUs."
        )
    card = torch.cuda.get_device_properties(own)  # starts CUDA: from here the count is final
    if "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1:
        raise CourseError(
            "CUDA had started on several GPUs before the plan was made. Restart the kernel and "
            "make the plan first, or set CUDA_VISIBLE_DEVICES=0."
        )
    # is_bf16_supported() would count emulation, in which a T4 crawls: keep the capability.
    capability = card.major, card.minor
    oldest = (7, 5) if int((torch.version.cuda or "0").partition(".")[0]) >= 13 else (7, 0)
    if capability < oldest:  # torch and bitsandbytes hold no kernels for it
        raise CourseError(
            f"{card.name} has CUDA capability {card.major}.{card.minor}, and the libraries need "
            f"{oldest[0]}.{oldest[1]}. Choose a newer GPU, or hide this one: CUDA_VISIBLE_DEVICES="
        )
    return Hardware("cuda", card.name, card.total_memory / 1e9, capability, False, cores, gpus)


@functools.cache
def fast_bf16() -> bool:
    """Measure whether this CPU multiplies clearly faster in bf16 than in fp32; once a process."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: matrix @ matrix, repeat=4, number=1))  # one warms up

    return seconds(torch.float32) > 1.2 * seconds(torch.bfloat16)


def take_one_gpu() -> int:
    """Return how many GPUs there are; without a launcher, hide all but the first.

    On several GPUs transformers would split each batch over them (``nn.DataParallel``), which TRL
    refuses. CUDA reads ``CUDA_VISIBLE_DEVICES`` once, when it starts, so this has to come first.
    ``MEDQUAD_GPUS`` still lists all, for child processes and for a launcher in a notebook.
    """
    import torch

    listed = os.environ.get("MEDQUAD_GPUS", "")
    if listed and "LOCAL_RANK" in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = listed
    count = torch.cuda.device_count()  # asks the driver's management library: starts no CUDA
    if "LOCAL_RANK" in os.environ:
        return count
    if count > 1:
        every = ",".join(map(str, range(count)))
        os.environ["MEDQUAD_GPUS"] = listed = os.environ.get("CUDA_VISIBLE_DEVICES") or every
        os.environ["CUDA_VISIBLE_DEVICES"] = listed.partition(",")[0]
    return len(listed.split(",")) if count and listed else count


def free_memory() -> None:
    """Free models that nothing refers to, and give their GPU memory back to the driver."""
    import torch

    gc.collect()  # a model that TRL trained refers to itself
    torch.cuda.empty_cache()  # does nothing without a GPU


def peak_memory_gb() -> float | None:
    """Return the most memory of this process so far, in GB: of its GPU, else its RAM, else None."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    with suppress(ImportError):  # Windows has no such module
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
    return None


def triton_needs() -> tuple[str, bool]:
    """Say whether Triton can compile its small C extension, as TRL's loss makes it do on a GPU."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
    needs = {"C compiler": bool(compiler), "Python.h": header.is_file()}
    lacking = " and no ".join(name for name, here in needs.items() if not here)
    todo = f"no {lacking}: apt-get install gcc python3-dev"
    return todo if lacking else ", ".join(needs), not lacking


# What steers every client of the network: a proxy, certificates, a mirror of the Hub.
STEERING = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR",
            "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HF_ENDPOINT", "HF_HUB_OFFLINE")  # fmt: skip


def network_settings() -> str:
    """Name the variables that steer the network here, without their values: some hold passwords."""
    names = [n for n in STEERING if os.environ.get(n) or os.environ.get(n.lower())]
    return f"the environment sets {', '.join(names)}" if names else ""


@contextmanager
def network(what: str, todo: str) -> Iterator[None]:
    """Turn whatever a client of the network raises into one message; ``todo`` is the next step."""
    try:
        yield
    except Exception as error:  # each library has many kinds, and proxies add their own
        steering = f"; {text}" if (text := network_settings()) else ""
        raise CourseError(f"{what} ({_first_line(error)}{steering}). {todo}") from error


def hub_reachable(timeout: float = 3.0) -> bool:
    """Ask the Hugging Face Hub for a sign of life; ``HF_HUB_OFFLINE=1`` counts as no."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    import huggingface_hub

    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    with suppress(Exception):  # the client that downloads: its proxies, certificates and errors
        session = huggingface_hub.get_session()
        status = session.head(url, timeout=timeout, follow_redirects=True).status_code
        # A mirror may refuse its home page (4xx) and still give files. 407 comes from a proxy.
        return bool(status < 500 and status != 407)
    return False


def cache(name: str) -> Path:
    """Return the folder in $MEDQUAD_CACHE for a model (OWNER/NAME) or for ``MedQuAD``."""
    base = user_path(os.environ.get("MEDQUAD_CACHE") or "~/.cache/medquad")
    return base / name.replace("/", "--")


def fetched(name: str) -> Path | None:
    """Return the folder that ``medquad fetch`` wrote for ``name``, if it is there."""
    with suppress(CourseError, OSError):  # no home folder, or one that cannot be read
        return folder if (folder := cache(name)).is_dir() else None
    return None


def cached(model_id: str, revision: str | None = None) -> bool:
    """Return whether a model of the Hub is in the local cache, so that no network is needed."""
    from huggingface_hub import snapshot_download

    with suppress(Exception):  # not there, or not whole
        folder = snapshot_download(model_id, revision=revision, local_files_only=True)
        return any(Path(folder).glob("*.safetensors"))
    return False


def hub_commit(model_id: str, revision: str | None = None) -> str | None:
    """Return the commit of ``revision`` (default: main) of a model: the cached one, else the Hub's.

    Where neither knows it, return ``revision``; loading the model then says why.
    """
    from huggingface_hub import hf_hub_download

    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    for local in (True, False):  # a base must not change because the Hub has a newer one
        with suppress(Exception):  # the library raises many kinds of error here
            where = {"revision": revision, "local_files_only": local}
            # The cache names a snapshot's folder by its commit.
            return Path(hf_hub_download(model_id, "config.json", **where)).parent.name
    return revision


def is_here(model_id: str, revision: str | None = None) -> bool:
    """Return whether the weights of a model are on this machine, fetched or in the Hub's cache."""
    return model_id == "embedded" or bool(fetched(model_id)) or cached(model_id, revision)


def on_colab() -> bool:
    """Return whether this is a notebook on Colab, which loads its own package before any cell."""
    return "google.colab" in sys.modules


def on_kaggle() -> bool:
    """Return whether this is a notebook on Kaggle."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def hub_token() -> str | None:
    """Return the Hub token of the environment, a login or the secrets of Colab or Kaggle."""
    import huggingface_hub

    token: str | None = None
    try:
        token = huggingface_hub.get_token()
    except Exception:  # Colab's vault timed out, and huggingface_hub let it through
        if not on_colab():
            raise
        # Without this, every download would ask again, and fail again.
        huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True
    if not token and on_kaggle():  # huggingface_hub knows Colab's secrets only
        with suppress(Exception):  # one error for each of missing, detached and offline
            from kaggle_secrets import UserSecretsClient

            token = os.environ["HF_TOKEN"] = str(UserSecretsClient().get_secret("HF_TOKEN"))
    return token


def token_gap() -> str:
    """Return what to do if ``hub_token`` gave none on Colab or Kaggle; elsewhere ""."""
    lacks = "gives this notebook no secret HF_TOKEN:"
    if on_kaggle():
        return f"Kaggle {lacks} Add-ons > Secrets, attach it, switch Internet on, then run again"
    todo = "key icon > Add new secret, with Notebook access, then Runtime > Restart session"
    return f"Colab {lacks} {todo}" if on_colab() else ""


def checkout(*first: Path) -> Path | None:
    """Return the root of the course's checkout: one of ``first``, or around the working folder."""
    for root in (*first, Path.cwd(), *Path.cwd().parents):
        if (root / "medquad_utils").is_dir() and list(root.glob("notebooks/0*_*.ipynb")):
            return root
    return None


def default_out() -> str:
    """Return the results folder: $MEDQUAD_OUT, what Colab or Kaggle keep, else runs/."""
    if chosen := os.environ.get("MEDQUAD_OUT"):
        return str(user_path(chosen))
    if on_colab() and DRIVE.is_dir():
        return str(DRIVE / "medquad-runs")  # Colab's own disk is lost with the session
    if on_kaggle():
        return str(KAGGLE / "medquad-runs")
    return str((checkout() or Path.cwd()) / "runs")


def hosted_results(folder: Path) -> str:
    """Say where results are on Colab or Kaggle, and whether they outlive the session; else ""."""
    if on_kaggle():
        return f"in {folder}: 'Save Version' keeps it, the end of the session does not"
    if folder.is_relative_to(DRIVE):
        return f"on Drive, in {folder.relative_to(DRIVE)}: a later session goes on from there"
    lost = "on this runtime's disk, lost with the session: mount Drive (folder icon > Mount Drive)"
    return f"{lost} and run this cell again" if on_colab() else ""


def show_errors_plainly() -> None:
    """In a notebook, show a ``CourseError`` or a cell run out of order as one line."""
    if "IPython" not in sys.modules or (shell := sys.modules["IPython"].get_ipython()) is None:
        return

    def handler(shell: Any, kind: Any, error: Any, trace: Any, tb_offset: Any = None) -> list[str]:
        todo = "choose Run > Run All Above Selected Cell, then run this one again."
        unordered = f". A cell above has not been run yet: {todo}"
        text = f"{error}{unordered if isinstance(error, NameError) else ''}"
        shell._showtraceback(kind, text, [f"{kind.__name__}: {text}"])
        return [text]

    shell.set_custom_exc((CourseError, NameError), handler)


def versions() -> dict[str, str]:
    """Return the installed versions of Python and of the main packages."""
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


def direct_loopback() -> None:
    """Let clients in this process reach servers of this machine without a proxy."""
    for name in ("NO_PROXY", "no_proxy"):
        known = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*known, "127.0.0.1", "localhost"]))
