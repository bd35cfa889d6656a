"""``medquad doctor``: is this machine ready for a class on the profile ``tiny``?"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from medquad_utils import CourseError, atomic, course, machine, profiles
from medquad_utils.files import read_json

OK, WARNING, PROBLEM = "ok", "warning", "problem"
BESIDE_GB = 1.0  # RAM of a browser and JupyterLab beside a lesson's kernel
DISK_GB = 1.0  # tiny's results take 0.1 GB; lessons 05 and 08 write a merged model for a while
Finding = tuple[bool, str, str]  # whether all is well, what was found, the next step if not


def report() -> bool:
    """Print a finding for each check, and a verdict; return whether a class can begin."""
    states = Counter[str]()
    for what, (bad, check) in CHECKS.items():
        try:
            well, text, todo = check()
            state = OK if well else bad
        except Exception as error:  # a broken package or file raises anything
            kind = "" if isinstance(error, CourseError) else f"{type(error).__name__}: "
            state, text, todo = PROBLEM, kind + str(error).partition("\n")[0], ""
        print(f"{state:<7}  {what:<9}  {text}")
        if todo and state != OK:
            print(f"{'':<20}-> {todo}")
        states[state] += 1
    verdict = "not ready" if states[PROBLEM] else "ready"
    print(f"\n{verdict} for class: {states[PROBLEM]} problems, {states[WARNING]} warnings")
    return not states[PROBLEM]


def _device() -> Finding:
    found = machine.detect()
    number = f"bf16 is {'faster' if found.bf16_cpu else 'not faster'} than fp32"
    if found.capability:
        number = "CUDA capability {}.{}".format(*found.capability)
    size = f"{found.memory_gb:.0f} GB, {found.cores} cores"
    return True, f"{found.device}: {found.name}, {size}, {number}", ""


def _installed(name: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name).partition("+")[0]  # 2.13.0 of 2.13.0+cpu
    return ""


def _packages() -> Finding:
    from packaging.requirements import Requirement

    lines = importlib.metadata.requires("medquad-qlora") or ()
    needs = [need for need in map(Requirement, lines) if not need.marker]  # a marker: of an extra
    have = {need.name: _installed(need.name) for need in needs}
    wrong = [n for n in needs if not (v := have[n.name]) or not n.specifier.contains(v, True)]
    good = f"Python {platform.python_version()} and {len(needs)} packages are in range"
    listed = [f"{n.name} {have[n.name] or 'is missing'}, expected {n.specifier}" for n in wrong]
    todo = "pip install " + " ".join(f'"{need}"' for need in wrong)
    return not wrong, "; ".join(listed) or good, todo


def _tested() -> Finding:
    pins = (course.notebooks_folder().parent / "constraints.txt").read_text(encoding="utf-8")
    pairs = re.findall(r"^([\w.-]+)==([\w.]+)", pins, re.MULTILINE)
    have = [(name, _installed(name), pinned) for name, pinned in pairs]
    others = [f"{name} {own} (tested: {pin})" for name, own, pin in have if own not in ("", pin)]
    good = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    return not others, ", ".join(others) or good, "install the tested versions: make course"


def _memory() -> Finding:
    import psutil

    timings = read_json(course.notebooks_folder() / "timings.json")
    need = max(lesson["peak_gb"] for lesson in timings.values()) + BESIDE_GB
    free = psutil.virtual_memory().available / 1e9
    text = f"{free:.1f} GB of RAM free, {need:.1f} GB needed (largest lesson and a browser)"
    return free >= need, text, "close other programs and notebooks"


def _hub() -> Finding:
    if not machine.hub_reachable():
        return False, "out of reach", "profile tiny needs no network, the others do"
    no_token = machine.token_gap() or "not set, which only a Llama needs"
    return True, f"reachable; HF_TOKEN: {'set' if machine.hub_token() else no_token}", ""


def _disk() -> Finding:
    out, todo = Path(machine.default_out()), "set MEDQUAD_OUT to another folder of yours"
    try:
        atomic.check_place(out)
    except CourseError as error:
        return False, str(error), todo
    free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free / 1e9
    text = f"{free:.1f} GB free in {out.name}/, {DISK_GB:.1f} GB needed"
    return free >= DISK_GB, text, todo


def _port(number: int, todo: str) -> Finding:
    try:
        socket.create_server(("127.0.0.1", number)).close()
    except OSError:
        return False, "taken", todo
    return True, "free", ""


def _lessons() -> Finding:
    changed, count = course.changed(), len(course.lessons())
    text = f"changed since their outputs were made: {', '.join(changed)}"
    todo = "git checkout notebooks, or stamp your own changes: python tests/stamp.py"
    return not changed, text if changed else f"{count} lessons", todo


def _model() -> Finding:
    from medquad_utils import generation

    plan = profiles.resolve("tiny")
    loaded, tokenizer = generation.load_base(plan), generation.load_tokenizer(plan)
    generation.ask(loaded, tokenizer, ["What is asthma?"], 1)
    return True, "the embedded model loads in 4 bits and answers", ""


def _fetched() -> Finding:
    small = profiles.PROFILES["small"]
    here = {
        "small": machine.is_here(small.model_id, small.revision),
        "medquad": bool(machine.fetched("MedQuAD")),
    }
    texts = "{0} is not here (to get it: medquad fetch {0})", "{0} is here"
    return True, ", ".join(texts[there].format(what) for what, there in here.items()), ""


def _auto() -> Finding:
    plan = profiles.resolve("auto")
    return True, f"takes {plan.profile} ({plan.why.removeprefix('auto: ')})\n\n{plan}", ""


# What -> the state if it is not well, the check. A check that raises is a problem.
CHECKS: dict[str, tuple[str, Callable[[], Finding]]] = {
    "device": (PROBLEM, _device),
    "packages": (PROBLEM, _packages), "tested": (WARNING, _tested), "memory": (PROBLEM, _memory),
    "Hub": (WARNING, _hub), "disk": (PROBLEM, _disk),
    "port 8888": (WARNING, lambda: _port(8888, "read the address that JupyterLab prints")),
    "port 7860": (WARNING, lambda: _port(7860, "start the chat with: medquad demo --port 7861")),
    "lessons": (WARNING, _lessons),
    "model": (PROBLEM, _model), "fetched": (PROBLEM, _fetched), "auto": (PROBLEM, _auto),
}  # fmt: skip
