"""A thousand bad inputs through every command of ``medquad``, in one process and its forks.

``python tests/bad_inputs.py [EACH] [SEED]`` runs all cases, or EACH of every kind that the seed
draws, and counts outcomes by command. Whatever a command is given: it ends with one line that names
the value and a status that is right; it changes no file of the user and leaves no half of one.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ["MEDQUAD_CACHE"] = os.devnull
os.environ |= dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), "")

import papermill
from conftest import REPO, tiny
from test_data import KAGGLE, REFUSED, SHAPES

from medquad_utils import cli, generation

Tree = dict[str, str]  # path -> state
QUESTION, REPOSITORY, MINE = "What causes gout?", "me/derm-qa", b"mine, and no other's"
NEEDS = {"ask": [QUESTION], "explain": [QUESTION], "evaluate": ["--questions", "mine.csv"],
         "publish": ["--repo", REPOSITORY, "--dry-run"], "fetch": ["medquad"]}  # fmt: skip
MODEL = ("run", "train", "ask", "evaluate", "explain", "demo", "publish")
NUMBERS = ("-1", "x", "1.5", "", "1e9999", "٣", "9" * 30, "nan", "0x10", "--", "4294967296")
PATHS = ("a file/x", "/proc/x", "x" * 300, "~no one/x", "a\0b", "dangling/../a file/y")
WEIRD = ("", " ", "TINY", "tiny ", "../tiny", "\udcff",
         "💥" * 9, "a\nb", "%s{0}", "-x", "'\";", "/")  # fmt: skip
NAMES = (" lead.csv", "-dash.csv", "a\nb.csv", "ü💥.csv", "y" * 240 + ".csv", "$(touch x).csv",
         "%s%n.csv", "'\".csv", "CON.csv", "a;b&c.csv", "\udcff.csv", "[a]*?.csv")  # fmt: skip
DAMAGES: dict[str, bytes | None] = {
    "empty": b"", "half": b'{"profile": "ti', "list": b"[]", "null": b"null", "object": b"{}",
    "binary": bytes(range(256)), "deep": b"[" * 99_999, "surrogate": b'{"profile": "\\ud800"}',
    "other": b'{"profile": 3, "recipe": 1, "seed": "x", "model_id": [], "model_path": {}}',
    "folder": None,
}  # fmt: skip
RECORDS = {  # command -> what it reads below runs/tiny
    "ask": ("adapter/plan.json", "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors"),
    "explain": ("adapter/plan.json", "data/data.json", "data/train.parquet"),
    "evaluate": ("adapter/adapter_config.json", "data/data.json", "data/validation.parquet"),
    "publish": ("adapter/plan.json", "metrics/train.json", "evaluation/metrics.json"),
    "demo": ("adapter/plan.json",),
    "train": ("data/data.json", "data/test.parquet", "checkpoints/plan.json"),
}  # fmt: skip
OURS = ("data.json", "train.parquet", "test.parquet", "README.md", "app.py", "config.json",
        "model.safetensors", "metrics.json", "page.html", "picture.png")  # fmt: skip
PROXIES = ("http://127.0.0.1:9", "socks5://127.0.0.1:9", "socks://127.0.0.1:9/", "nonsense",
           "http://[", "http://u:secret@127.0.0.1:9", "ftp://127.0.0.1")  # fmt: skip


@dataclass
class Case:
    """A command as typed. ``works`` is its right outcome; None: both, if they are clean."""

    arguments: list[str]
    works: bool | None = False
    named: str = ""  # what the message must hold
    files: dict[str, bytes | None] = field(default_factory=dict)  # to write before; None: a folder
    environment: dict[str, str] = field(default_factory=dict)
    child: Callable[[], object] | None = None  # run in a fork, after this

    def __str__(self) -> str:
        return " ".join(map(ascii, self.arguments)) + f" {[*self.files]} {self.environment}"


def case(command: str, *arguments: str, **more: Any) -> Case:
    """A case whose required arguments are given, unless they are among ``arguments``."""
    needs = NEEDS.get(command, [])
    given = needs if not (needs[:1] and needs[0] in arguments) else []
    return Case([command, *given, *arguments], **more)


def options() -> Iterator[Case]:
    """What the parser must refuse, and values of numbers and paths."""
    for command, (_, own) in cli.COMMANDS.items():
        yield case(command, "--nope", named="--nope")
        yield case(command, "more", "and more", named="more")
        for flag, metavar, default, _ in own:
            if type(default) in (int, float):
                texts = [t for t in NUMBERS if type(default) is int or t != "1.5"]
                yield from (case(command, flag, text, named=flag) for text in texts)
            if flag.startswith("-") and not isinstance(default, bool):
                yield Case([command, flag], named=flag)
            if metavar in cli.PATHS and flag != "--runs":
                ending = {"FILE.html": ".html", "FILE.png": ".png"}.get(metavar or "", "")
                yield from (case(command, flag, path + ending) for path in PATHS)
    for command in MODEL:
        yield from (case(command, "--profile", text, named="profile") for text in WEIRD)
        for text in (*WEIRD[1:], *PATHS, "own", "mine.csv", "a/b/c", "own/config.json"):
            yield case(command, "--profile", "tiny", "--model", text)
        yield from (case(command, "--profile", "tiny", "--runs", p) for p in (*PATHS, "a file"))
    yield from (Case(words) for words in ([], ["nope"], [""], ["--nope"], ["DATA"]))
    yield from (Case(w, True) for w in (["--help"], ["data", "-h"], ["--version"], ["estimate"]))


def parameters() -> Iterator[Case]:
    """Notebook parameters and lessons of ``medquad run``."""
    for name in ("rows", "max_steps", "lora_r", "seed"):
        yield from (case("run", "-p", f"{name}={text}", named=name) for text in NUMBERS)
    wrong = {"source": WEIRD[1:], "specialty": WEIRD[1:], "data_path": [*PATHS, "no.csv"],
             "model": [*WEIRD[1:], *PATHS], "profile": WEIRD, "out": PATHS,
             "temperatur": ["1"], "": ["1"], "__class__": ["x"], "rows ": ["1"]}  # fmt: skip
    for name, texts in wrong.items():
        only = ["--only", "09" if name == "specialty" else "01"]
        yield from (
            case("run", "-p", f"{name}={t}", *only, named="" if t in PATHS else name) for t in texts
        )
    for only in ("99", "x", ",", "01,99", "-1", "1.5", "０１", "01;02", " "):
        yield case("run", "--profile", "tiny", "--only", only, named="only" if only in " ," else "")
    yield case("run", "-p", "rows=1", "-p", "rows=2", named="rows")
    yield case("run", "-p", "profile=tiny", "--profile", "small", named="profile")
    yield case("run", "--profile", "tiny", "-p", "data_path=a file", named="a file")
    yield case("run", "--profile", "tiny", "--reference", "own", named="own")
    for command in ("ask", "explain"):
        for text in ("", " ", "\u200b", "\x00\x01", "\ufeff"):
            yield Case([command, text, "--profile", "tiny"], named="question")
    for text in ("fever " * 5000, "a" * 20_000):
        yield Case(["ask", text, "--profile", "tiny"], named="question")
        yield Case(["explain", text, "--profile", "tiny"], named="question")


def tables(chance: random.Random) -> Iterator[Case]:
    """Tables that are damaged, of another kind, or have a hostile name."""
    for (name, (content, *_)), read in itertools.product(REFUSED.items(), (data, questions)):
        raw = content.encode() if isinstance(content, str) else content
        yield read(f"in/{name}", raw, name.partition(".")[0])
    good = {name: content.encode(encoding) for name, (content, encoding, _) in SHAPES.items()
            if isinstance(content, str) and not name.endswith(".gz")}  # fmt: skip
    for (name, raw), _ in itertools.product(good.items(), range(12)):
        torn = bytearray(raw)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(torn))
            torn[place : place + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        yield data(f"in/{name}", bytes(torn), works=None)
        yield questions(f"in/{name}", bytes(torn[: chance.randrange(len(torn))]))
    for name in NAMES:
        yield data(name, KAGGLE.encode(), "rows")  # two rows are too few, whatever the name
        yield data(f"{name}/x.csv", b"a,b\n1\n", "x.csv")
        yield questions(name, b"topic,answer\n1,2\n", "question")
    for source in ("sample", "web", "CSV", "", "hub", "xml"):
        yield case("data", "--source", source, "--data-path", "mine.csv", "--out", "out")
    for option in ("--without", "--specialty"):
        yield from (case("data", option, text, "--out", "out") for text in WEIRD[1:])
    for name in ("no.csv", "a file", "own", "dangling", "/", "/proc/self/mem", "/dev/null"):
        yield case("data", "--source", "csv", "--data-path", name, "--out", "out")
        yield case("evaluate", "--questions", name, "--profile", "tiny")
        yield case("evaluate", "--archive", name, "--profile", "tiny")


def data(name: str, raw: bytes, named: str = "", works: bool | None = False) -> Case:
    """``medquad data`` of a file with this content."""
    words = ["data", "--source", "csv", f"--data-path={name}", "--out", "out"]
    return Case(words, works, named, {name: raw})


def questions(name: str, raw: bytes, named: str = "") -> Case:
    """``medquad evaluate`` of a file; it ends at the adapter, so no file makes it a success."""
    ends = ["--profile", "tiny", "--adapter", "own"]
    return Case(["evaluate", f"--questions={name}", *ends], False, named, {name: raw})


def records() -> Iterator[Case]:
    """Damaged records below runs/, and files of users where results should go."""
    more = {"publish": ["--out", "out"], "train": ["--max-steps", "2"],
            "demo": ["--space", "out", "--repo", REPOSITORY], "explain": ["--out", "out/p.html"],
            "evaluate": ["--archive", "no.csv"]}  # fmt: skip
    for command, names in RECORDS.items():
        for name, (damage, raw) in itertools.product(names, DAMAGES.items()):
            told = damage in ("empty", "half", "list", "null", "binary", "deep")
            never = command in ("evaluate", "train") or (told and "demo" not in command)
            yield case(command, "--profile", "tiny", *more.get(command, ()), works=False if never
                       else None, files={f"runs/tiny/{name}": raw})  # fmt: skip
    for name in OURS:
        theirs = {f"out/{name}": MINE}
        yield case("data", "--out", "out", files=theirs, works=None)
        yield case("publish", "--profile", "tiny", "--out", "out", files=theirs)
        yield case("demo", "--profile", "tiny", *more["demo"], files=theirs)
        yield case("evaluate", *more["evaluate"], "--out", "out", files=theirs)
    for name in ("README.md", "config.json", "model.safetensors"):  # the command has such a file
        yield case("publish", "--profile", "tiny", "--out", "out", files={f"out/{name}": MINE},
                   named="there already")  # fmt: skip
    for name in ("README.md", "app.py"):
        yield case("demo", "--profile", "tiny", *more["demo"], files={f"out/{name}": MINE})
    yield case("evaluate", *more["evaluate"], "--out", "own", named="metrics.json")
    yield case("explain", "--profile", "tiny", "--out", "page.html", named="page.html")
    yield case("explain", "--profile", "tiny", "--out", "link.html", named="link.html")
    yield case("estimate", "--out", "picture.png", named="picture.png")
    for ending in ("x.txt", "x", "x.PNG", ".png/x", "own"):
        yield case("estimate", "--out", ending)
        yield case("explain", "--out", ending)
    for command in ("publish", "demo"):
        for repo in ("derm", "a/b/c", "", "/", "me/", "../x", "me/ü", "me/" + "x" * 200, "me/a b"):
            extra = ["--space", "out"] if command == "demo" else []
            yield Case([command, "--profile", "tiny", "--repo", repo, *extra])
    for licence in ("no.txt", "own", "a file/x"):
        yield case("publish", "--profile", "tiny", "--licence", licence, works=None)


def surroundings(port: int) -> Iterator[Case]:
    """Proxies, mirrors, locales, closed or full outputs, full disks, homes."""
    for name, proxy in itertools.product(("HTTPS_PROXY", "https_proxy", "ALL_PROXY"), PROXIES):
        yield case("fetch", environment={name: proxy, "HTTPS_PROXY": proxy}, named="PROXY")
        yield case("estimate", works=True, environment={name: proxy})
        yield case("data", "--source", "hub", environment={name: proxy}, named=name.upper())
    for status in (200, 204, 301, 302, 401, 403, 404, 405, 407, 408, 418, 429, 500, 502, 503, 599):
        proxy = f"http://127.0.0.1:{port}/{status}"
        yield case("fetch", environment={"HTTPS_PROXY": proxy, "MEDQUAD_TEST_STATUS": str(status)})
    for what in WEIRD:
        yield Case(["fetch", what], named="fetch" if what.strip() != "-x" else "")
    for name, value in {"WORLD_SIZE": "abc", "LOCAL_RANK": "x"}.items():
        yield case("train", named=name, environment={"LOCAL_RANK": "0", name: value})
    yield case("demo", "--profile", "tiny", "--port", "0", named="ALL_PROXY", child=not_for_long,
               environment={"ALL_PROXY": "socks://127.0.0.1:9/"})  # fmt: skip
    for value in ("~no one/x", "a file", "/proc/x"):
        yield case("data", environment={"MEDQUAD_OUT": value})
        yield case("estimate", works=True, environment={"MEDQUAD_CACHE": value, "HOME": value})
    for text in ("estimate", "--help", "data --out out", "estimate --out out/p.png"):
        for child in (ascii_output, closed_streams, full_output):
            home = {"HOME": "/proc/x", "LC_ALL": "C"}
            yield Case(text.split(), child is not full_output, environment=home, child=child)
    yield Case(["data", "--out", "Données"], True, child=ascii_output)  # it prints the name
    for size in (0, 1, 100, 4096, 20_000, 60_000):
        yield Case(["data", "--out", "out"], False, "space", child=lambda s=size: limit(s))
        yield Case(["estimate", "--out", "out/p.png"], False if size < 20_000 else None,
                   child=lambda s=size: limit(s))  # fmt: skip


def ascii_output() -> None:
    sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(1), "wb"), encoding="ascii")


def closed_streams() -> None:
    os.closerange(1, 3)
    sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as Python does


def full_output() -> None:
    sys.stdout = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


def not_for_long() -> None:
    signal.alarm(100)


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Proxy(BaseHTTPRequestHandler):
    """Answer every CONNECT with the status that the environment names."""

    def do_CONNECT(self) -> None:
        self.send_response(int(os.environ.get("MEDQUAD_TEST_STATUS", "403")))
        self.send_header("Location", "http://127.0.0.1:9/")
        self.end_headers()
        self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


def world(root: Path) -> None:
    """A working folder of a user: files, links, and results of ``tiny``."""
    own = root / "own"
    own.mkdir(parents=True)
    for name in OURS:
        (own / name).write_bytes(MINE)
    for name in ("mine.csv", "a file", "page.html", "picture.png"):
        (root / name).write_text(KAGGLE)
    (root / "link.html").symlink_to("page.html")
    (root / "dangling").symlink_to("nowhere")
    shutil.copytree(REPO / "tests" / "adapter", root / "runs" / "tiny" / "adapter")
    os.chdir(root)
    assert cli.main(["data", "--out", "runs/tiny/data"]) == 0
    plain = generation.load_base
    base = functools.cache(lambda quantized: plain(tiny(), quantized))  # loaded once
    generation.load_base = lambda plan, quantized=True: copy.deepcopy(base(quantized))
    papermill.execute_notebook = None  # a lesson that starts is a fault


def tree(root: Path) -> Tree:
    """Every file and link below a folder, with its size and time in nanoseconds."""
    states = ((path, path.lstat()) for path in root.rglob("*") if not path.is_dir())
    return {str(p.relative_to(root)): f"{s.st_size} {s.st_mtime_ns}" for p, s in states}


def forked(one: Case) -> tuple[int, str]:
    """Run a case in a fork; returns its exit status and what it wrote to stderr."""
    read, write = os.pipe()
    if not (child := os.fork()):
        status = 99
        try:
            os.dup2(write, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")
            assert one.child
            one.child()
            status = cli.main(one.arguments)
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}".encode())
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def run(one: Case) -> tuple[int, str]:
    """Run a case; returns the exit status and what it wrote to stderr."""
    if one.child:
        return forked(one)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        try:
            status = cli.main(one.arguments)
            return status, errors.getvalue()
        except BaseException as error:
            return 99, f"{errors.getvalue()}Traceback: {error!r}"


def faults(one: Case, status: int, said: str, before: Tree, after: Tree) -> Iterator[str]:
    """What is wrong with the end of a case."""
    if status in (99, 120) or status < 0 or re.search("Traceback|Please report", said):
        yield "traceback"
    if (one.works is False and status == 0) or (one.works and status):
        yield "wrong status"
    ours = [line.startswith("medquad: ") for line in said.splitlines()]  # others: libraries' bars
    if status and (sum(ours) != 1 or not ours[-1]):
        yield "not one line"
    if status and one.named not in said:
        yield "does not name the value"
    places = {str(Path.cwd()), str(REPO), "site-packages"}
    if any(place in said and place not in " ".join(one.arguments) for place in places):
        yield "a path that was not given"
    if any(path.endswith((".part", ".old")) for path in after):
        yield "half a file"
    if status and one.child is not full_output and after.keys() - before.keys():
        yield "a file of a failure"
    lost = [path for path in before if before[path] != after.get(path)]
    theirs = ("mine" in p or "own" in p or one.files.get(p) == MINE for p in lost)
    if lost and (status or any(theirs)):
        yield "a file of the user"


def attempt(one: Case, pristine: Path) -> tuple[str, list[str]]:
    """Run a case in the working folder, and put the folder right again."""
    root = Path.cwd()
    for name, raw in one.files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # An empty folder of an earlier case may be left: ``tree`` sees files only.
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.mkdir() if raw is None else path.write_bytes(raw)
    before, kept = tree(root), dict(os.environ)
    os.environ.update(one.environment)
    status, said = run(one)
    os.environ.clear()
    os.environ.update(kept)
    found = list(faults(one, status, said, before, tree(root)))
    os.chdir(root)
    if tree(root) != tree(pristine):
        for path in root.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(pristine, root, symlinks=True, dirs_exist_ok=True)
    return f"{status}: {said.strip()[:300]}", found


def kinds(port: int, seed: int) -> list[list[Case]]:
    """All cases by kind; the seed damages tables.

    A kind is a line of this file that yields cases, with what it does to the surroundings: the
    child, the names of variables, the damaged record. A new ``yield`` is a new kind.
    """
    found = defaultdict[Any, list[Case]](list)
    parts: tuple[Any, ...] = (
        parameters(), options(), tables(random.Random(seed)), surroundings(port), records()
    )  # fmt: skip
    for part in parts:
        for one in part:
            damaged = (name for name in one.files if name.startswith("runs/"))
            child = one.child.__name__ if one.child else ""
            found[part.gi_frame.f_lineno, child, *one.environment, *damaged].append(one)
    return list(found.values())


def main(each: int = 0, seed: int = 0) -> int:
    """Run all cases, or ``each`` of every kind; print faults and a table. Returns the faulty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    chance = random.Random(seed)
    groups = (
        chance.sample(k, min(each or len(k), len(k))) for k in kinds(server.server_port, seed)
    )
    cases = [one for group in groups for one in group]
    outcomes, bad = defaultdict[str, Counter[str]](Counter), 0
    with tempfile.TemporaryDirectory() as temporary:
        root, pristine = Path(temporary).resolve() / "home", Path(temporary).resolve() / "pristine"
        world(root)
        shutil.copytree(root, pristine, symlinks=True)
        for one in cases:
            end, found = attempt(one, pristine)
            kind = "works" if end.startswith("0:") else "refused"
            outcomes[(one.arguments or ["none"])[0][:9]].update(found or [kind])
            bad += bool(found)
            if found:
                print(f"{', '.join(found)}: {one}\n    {end!a}", flush=True)
        os.chdir(REPO)
    server.shutdown()
    for command, counts in sorted(outcomes.items()):
        print(f"{command!a:<14}", dict(counts))
    print(f"{len(cases)} cases, {bad} with a fault")
    return bad


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
