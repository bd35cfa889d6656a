"""Prove the tests: apply each patch of this folder to a copy of the checkout and expect a failure.

``make mutants`` runs all of them, ``python tests/mutants/run.py NAME ...`` some. A patch is one
mistake. Its first line names the promise that it breaks, its second the test files that must
notice. The fast tier (``make check``) is tried first. Only a mutant that survives it meets the
tests marked ``full``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
REPO = HERE.parent.parent
WORKERS = 2
PASSED, FAILED, EMPTY = 0, 1, 5  # pytest's exit codes; EMPTY: no test of this tier in the files
SECONDS = 600  # for the test files of one mutant


@dataclass
class Mutant:
    """One mistake: the promise it breaks, the test files that must notice, and what they said."""

    patch: Path | None
    promise: str
    tests: list[str]
    verdict: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def name(self) -> str:
        return self.patch.stem if self.patch else "no mutant"


def read(patch: Path) -> Mutant:
    """A mutant from its file; raises ``SystemExit`` where its first two lines are not right."""
    promise, tests, *_ = patch.read_text(encoding="utf-8").splitlines()
    if not (promise.startswith("Promise: ") and tests.startswith("Tests: test_")):
        raise SystemExit(
            f"{patch.name}: the first two lines must be 'Promise: ...' and 'Tests: ...'."
        )
    return Mutant(patch, promise.removeprefix("Promise: "), tests.split()[1:])


def copy_of_checkout(folder: Path) -> Path:
    """Copy what git knows, and what it would add, to ``folder``."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, folder / name)
    return folder


def pytest(folder: Path, tests: Sequence[str], tier: str) -> int:
    """Run test files of one tier in the copy; returns pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", tier]
    # The copy comes before the installed package; threads of two runs would fight for two cores.
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    command += [f"tests/{name}" for name in tests]
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return FAILED  # a test that hangs is noticed
    (folder / "log.txt").write_bytes(done.stdout + done.stderr)
    return done.returncode


def judge(mutant: Mutant) -> Mutant:
    """Try one mutant, or none: fill in ``verdict``."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        folder = copy_of_checkout(Path(temporary))
        if mutant.patch:
            apply = ["git", "apply", "--whitespace=nowarn", str(mutant.patch)]
            if subprocess.run(apply, cwd=folder, capture_output=True).returncode:
                mutant.verdict = "does not apply"
                return mutant
        codes = [pytest(folder, mutant.tests, "not full")]
        if codes[0] in (PASSED, EMPTY) and mutant.patch:
            codes.append(pytest(folder, mutant.tests, "full"))
        if FAILED in codes:
            mutant.verdict = ("killed by make check", "killed by make test")[codes.index(FAILED)]
        else:
            mutant.verdict = "survived" if PASSED in codes else f"no test ran {codes}"
        if not mutant.patch and codes != [PASSED]:
            print((folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-3000:])
    mutant.seconds = time.monotonic() - started
    return mutant


def main(only: Sequence[str]) -> int:
    """Judge the mutants named in ``only``, or all; returns 1 if one lives or the tests fail."""
    mutants = [read(p) for p in sorted(HERE.glob("*.patch")) if not only or p.stem in only]
    files = sorted({name for mutant in mutants for name in mutant.tests})
    print(f"{len(mutants)} mutants, {WORKERS} at a time. First the same tests without a mutant:")
    started = time.monotonic()
    with ThreadPoolExecutor(WORKERS) as pool:
        parts = [files[n::WORKERS] for n in range(min(WORKERS, len(files)))]
        controls = pool.map(judge, [Mutant(None, "", part) for part in parts])
        if any(control.verdict != "survived" for control in controls):
            print("The tests fail without a mutant: mend that first.")
            return 1
        print("they pass.\n", flush=True)
        for mutant in pool.map(judge, mutants):
            print(f"{mutant.verdict:22} {mutant.seconds:4.0f} s  {mutant.name}", flush=True)
            if not mutant.verdict.startswith("killed"):
                print(f"{'':30}{mutant.promise}")
    fast = sum(mutant.verdict == "killed by make check" for mutant in mutants)
    killed = sum(mutant.verdict.startswith("killed") for mutant in mutants)
    took = (time.monotonic() - started) / 60
    print(f"\n{killed} of {len(mutants)} killed, {fast} of them by make check; {took:.0f} minutes.")
    return int(killed < len(mutants))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
