"""The command ``medquad``. Each command imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from medquad_utils import CourseError, __version__, atomic, files, machine, profiles, tables
from medquad_utils.profiles import PROFILES, SOURCES, Plan

RUNS = ("--runs", "DIR", "", "folder of the results (default: $MEDQUAD_OUT, or runs)")
PROFILE = ("--profile", "P", "auto", f"auto, {', '.join(PROFILES)} (default: auto)")
MODEL = ("--model", "OWNER/NAME|DIR", "", "the base (default: the adapter's, or the profile's)")
SHARED = (PROFILE, MODEL, RUNS)
HOST = ("--host", "H", "127.0.0.1", "address to listen on (default: only this machine)")
PATHS = ("DIR", "FILE", "PATH", "FILE.html", "FILE.png")  # metavars of options that are paths
WRITTEN = ("--out", "--runs", "--space", "--reference")
# What only a file of this package holds, by its ending.
MARKS = {".html": 'name="generator" content="medquad-qlora"', ".png": "Software\0medquad-qlora"}
SOURCE = f"{', '.join(SOURCES)} (default: "
DATA_PATH = ("--data-path", "PATH", "", "xml: folder; hub: OWNER/NAME; others: file or folder")
QUESTION = ("question", None, "", "in quotes")


def _path(flag: str, metavar: str, text: str) -> Path | None:
    """Read a path. What it names can be written, has the right ending, and is not the user's."""
    if not text:
        return None
    path, ending = files.user_path(text), Path(metavar).suffix
    if ending and path.suffix != ending:
        raise CourseError(f"{flag} {text!r}: expected a file name that ends in {ending}.")
    if ending:
        atomic.check_ours(path, MARKS[ending])
    if flag in WRITTEN:
        atomic.check_place(path.parent if ending else path)
    return path


# What the type of an option's default says about it.
KINDS: dict[type, dict[str, Any]] = {
    bool: {"action": argparse.BooleanOptionalAction}, list: {"action": "append"},
    str: {}, type(None): {"required": True},
}  # fmt: skip

# Command -> (its help, its options). An option is (flag, metavar, default, help).
COMMANDS: dict[str, tuple[str, tuple[tuple[str, str | None, Any, str], ...]]] = {
    "doctor": ("check this machine: hardware, Hub, packages, lessons, memory, disk, ports", ()),
    "fetch": ("fetch the weights of profile small, or MedQuAD, into the user's cache", (
        ("what", None, ("small", "medquad"), "SmolLM2-135M-Instruct, or the XML of MedQuAD"),
    )),
    "run": ("run the lessons with papermill", (
        *SHARED,
        ("--only", "02,04", "", "numbers of the lessons to run (default: all)"),
        ("-p", "NAME=VALUE", [], "a notebook parameter, for example -p source=xml"),
        ("--reference", "DIR", "", "also write the numbers of all lessons to DIR, to be committed"),
    )),
    "data": ("load, clean and split MedQuAD, and count what leaks between the parts", (
        RUNS,
        ("--source", "S", "", f"{SOURCE}sample)"),
        DATA_PATH,
        ("--out", "DIR", "", "where the parts go (default: <runs>/data; sample: <runs>/tiny/data)"),
        ("--without", "RULE", [], "a cleaning rule to leave out; may be repeated"),
        ("--specialty", "NAME", "", "only one field, for example cardiology"),
        ("--seed", "N", 0, "seed of the split (default: 0)"),
    )),
    "train": ("train the adapter without a notebook (GPUs: torchrun -m medquad_utils.training)", (
        *SHARED,
        ("--source", "S", "", f"{SOURCE}the profile's own)"),
        DATA_PATH,
        ("--rows", "N", 0, "training rows; 0 is as many as the profile says"),
        ("--max-steps", "N", 0, "training steps; 0 is as many as the epochs need"),
        ("--lora-r", "R", 0, "rank of the adapters; 0 is the profile's own"),
        ("--seed", "N", 0, "of the split, the draw and the adapters (default: 0)"),
        ("--print-launch", None, ("ddp", "fsdp2"),
         "print the path of a config for accelerate launch --config_file, and stop"),
    )),
    "ask": ("ask the tuned model one question", (
        QUESTION,
        *SHARED,
        ("--base", None, False, "ask the base instead, without an adapter"),
    )),
    "evaluate": ("score the tuned model on a file of questions, beside baselines", (
        *SHARED,
        ("--questions", "FILE", None, "CSV, JSONL or parquet with columns question and answer"),
        ("--adapter", "DIR", "", "the adapter (default: <runs>/<profile>/adapter)"),
        ("--data", "DIR", "", "folder of the train.parquet that the adapter was trained on"),
        ("--archive", "FILE", "", "more rows that the grounded answers may use"),
        ("--out", "DIR", "", "where the report goes (default: <runs>/<profile>/evaluation)"),
        ("--limit", "N", 1000, "questions at most, drawn if there are more (default: 1000)"),
        ("--batch", "N", 32, "questions answered at a time (default: 32)"),
        ("--safety", None, False, "ask the safety prompts as well"),
    )),
    "explain": ("answer one question with sources and attributions, as one HTML page", (
        QUESTION,
        *SHARED,
        ("--out", "FILE.html", "", "the page to write (default: <runs>/<profile>/explain.html)"),
    )),
    "demo": ("chat with the tuned model in a browser; or write the folder of a Space", (
        *SHARED,
        HOST,
        ("--port", "N", 7860, "port to listen on (default: 7860)"),
        ("--space", "DIR", "", "serve nothing: write the folder of a Hugging Face Space"),
        ("--repo", "USER/NAME", "", "the published model that the Space shows (with --space)"),
    )),
    "serve": ("serve the tuned model over the OpenAI API, behind the emergency rule", (
        *SHARED,
        HOST,
        ("--port", "N", 8000, "port to listen on (default: 8000)"),
    )),
    "publish": ("build the folder with card and licences, and push it to the Hub", (
        *SHARED,
        ("--repo", "USER/NAME", None, "the repository; for a Llama 3 NAME begins with llama-3"),
        ("--out", "DIR", "", "where the folder goes (default: <runs>/<profile>/published)"),
        ("--merged", None, False, "publish one merged model (always so if the base is local)"),
        ("--licence", "FILE", "", "a copy of the base's agreement, if its licence asks for one"),
        ("--dry-run", None, False, "build and check the folder, send nothing"),
    )),
    "estimate": ("estimate memory, tokens/s, minutes and price of training, on a listed card", (
        ("--profile", "P", "llama-8b", f"{', '.join(PROFILES)} (default: llama-8b)"),
        ("--model", "OWNER/NAME|DIR", "", "another Llama, or the path of its config.json"),
        ("--gpu", "CARD", "T4", "T4, L4, A10G, A100-40, A100-80, H100, H200, RTX 4090 or CPU"),
        ("--length", "N", 0, "tokens of a row (default: the plan's)"),
        ("--rank", "R", 0, "rank of the adapters (default: the profile's)"),
        ("--packing", None, True, "let short rows share a long one (default: on)"),
        ("--checkpointing", None, ("off", "full"), "recompute each block (default: the plan's)"),
        ("--price", "X", 0.0, "price of the card for an hour (default: show no price)"),
        ("--tokens", "N", 0, "tokens of an epoch (default: MedQuAD's training part)"),
        ("--out", "FILE.png", "", "also draw the memory as a picture"),
    )),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise it as any other mistake of a user."""
        raise CourseError(f"{message} (all options: {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """Build the grammar of the command line from ``COMMANDS``."""
    about = "QLoRA on MedQuAD, from raw data to a 4-bit Llama that answers."
    top = _Parser(prog="medquad", description=about)
    top.add_argument("--version", action="version", version=f"medquad {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, options) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for flag, metavar, default, about in options:
            number = {"type": functools.partial(profiles.number, flag, type(default))}
            kind = KINDS.get(type(default), number) | ({"metavar": metavar} if metavar else {})
            if metavar in PATHS:
                kind["type"] = functools.partial(_path, flag, metavar)
            if isinstance(default, tuple):
                kind, default = {"choices": default}, None
            command.add_argument(flag, help=about, default=default, **kind)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one line on stderr and exit status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads wait without spinning: 10 % slower on idle cores, over twice as fast on shared ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def work() -> int:
        options, unknown = parser().parse_known_args(arguments)
        if unknown:
            todo = f"all options: medquad {options.command} --help"
            raise CourseError(f"unrecognized arguments: {' '.join(unknown)} ({todo})")
        return int(globals()[f"_{options.command}"](options) or 0)

    return machine.guarded(work)


def _silence() -> None:
    """Show no warning and no progress bar of the libraries that load a model."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # bitsandbytes asks on a CPU for an optional package of kernels.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _plan(options: argparse.Namespace, adapter: Path | None = None) -> Plan:
    """Resolve the plan of a command that uses an adapter."""
    from medquad_utils import adapters

    _silence()
    return adapters.resolve_trained(
        options.profile, model=options.model, out=options.runs, adapter=adapter
    )


def _doctor(options: argparse.Namespace) -> bool:
    from medquad_utils import doctor

    _silence()
    return not doctor.report()


def _fetch(options: argparse.Namespace) -> None:
    from medquad_utils import fetch

    print({"small": fetch.small, "medquad": fetch.medquad}[options.what]())


def _run(options: argparse.Namespace) -> None:
    from medquad_utils import course

    if wrong := [pair for pair in options.p if "=" not in pair]:
        raise CourseError(f"-p {wrong[0]!r}: expected NAME=VALUE, for example -p source=xml.")
    shared = {"profile": options.profile, "model": options.model, "out": str(options.runs or "")}
    pairs = [pair.split("=", 1) for pair in options.p]
    left_out = {"profile": "auto", "model": "", "out": ""}
    pairs += [[name, value] for name, value in shared.items() if value != left_out[name]]
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise CourseError(f"parameter {twice[0]} is given twice: keep one value.")
    only = [number for number in options.only.split(",") if number.strip()]
    if options.only and not only:
        raise CourseError(f"--only {options.only!r}: expected numbers of lessons, such as 02,04.")
    if only and options.reference:
        raise CourseError("--reference needs all lessons: leave --only out.")
    course.run(dict(pairs), only, options.reference)


def _train(options: argparse.Namespace) -> None:
    from medquad_utils import training

    if options.print_launch:
        return print(training.CONFIGS[options.print_launch])
    given = {k: v for k, v in vars(options).items() if k not in ("command", "print_launch", "runs")}
    training.run(profiles.resolve(out=options.runs, **given))


def _data(options: argparse.Namespace) -> None:
    from medquad_utils import data, splits

    given = {name: getattr(options, name) for name in ("source", "data_path", "seed")}
    plan = profiles.resolve("tiny", out=options.runs, **given)
    # The default folder is tiny's own: its lessons would replace the parts of other rows.
    own = plan.source == "sample" and not (options.without or options.specialty)
    folder = options.out or (plan.folder if own else Path(plan.out)) / "data"
    _, card = data.make(plan, folder, options.without, options.specialty)
    parts = ", ".join(f"{part}.parquet" for part in splits.PARTS)
    print(f"{data.summary(card)}\n\nwritten to {folder}: {parts}, data.json")


def _ask(options: argparse.Namespace) -> None:
    def answer(asked: str) -> Iterator[str]:
        from medquad_utils import evaluation, generation, retrieval
        from medquad_utils.chat import NOTICE

        plan = _plan(options)
        load = generation.load_base if options.base else generation.load_tuned
        model, tokenizer = load(plan), generation.load_tokenizer(plan)
        context = model.config.max_position_embeddings
        evaluation.check_question(asked, tokenizer, context, plan.max_new_tokens)
        given = yield from generation.stream(model, tokenizer, asked, plan.max_new_tokens)
        yield "\n".join(["\n", NOTICE, *filter(None, [plan.origin])])

        def look_up() -> list[retrieval.Support]:
            return retrieval.cite(evaluation.archive_of_run(plan), asked, given.text)[1]

        yield from (f"\n{note}" for note in retrieval.dose_notes(given.text, look_up))

    _show(options, answer)


def _show(options: argparse.Namespace, answer: Callable[[str], Iterable[str]]) -> None:
    """Print the answer as it grows; in an emergency print what to do, and load no model."""
    from medquad_utils import safety

    question = tables.clean_text(options.question)
    if not tables.has_words(question):
        example = f'medquad {options.command} "What causes asthma?"'
        raise CourseError(f"the question is empty. Ask one in quotes: {example}")
    for piece in safety.guarded(question, lambda: answer(question)):
        print(piece, end="", flush=True)
    print()


def _evaluate(options: argparse.Namespace) -> None:
    from medquad_utils import data, evaluation, report

    if options.out:
        written = ("answers.parquet", "report.html", "report.md", "figures")
        others = [options.out / name for name in written]
        atomic.check_ours(options.out / "metrics.json", '"about_scores"', *others)
    if min(options.limit, options.batch) < 1:
        wrong = f"--limit {options.limit}, --batch {options.batch}"
        raise CourseError(f"{wrong}: expected whole numbers over 0.")
    print(questions := evaluation.read_questions(options.questions, options.limit))
    plan = _plan(options, options.adapter)
    adapter = options.adapter or plan.folder / "adapter"
    folder = options.out or plan.folder / "evaluation"
    rows = evaluation.training_data(plan, adapter, options.data)
    archive = []
    if options.archive:
        print(f"archive: {(loaded := data.load_table(options.archive))}")
        archive = loaded.rows
    with atomic.locked(folder, wait=False):
        metrics = evaluation.evaluate(
            plan, questions, rows.train, folder, adapter, archive, rows.validation,
            options.batch, options.safety,
        )  # fmt: skip
        page, text = report.write(metrics, folder)
    print(f"{report.table(metrics)}\n")
    print(f"written to {folder}: {page.name}, {text.name}, metrics.json, answers.parquet")


def _explain(options: argparse.Namespace) -> None:
    def answer(asked: str) -> Iterator[str]:
        from medquad_utils import explanation

        plan = _plan(options)
        result = explanation.explain(plan, asked)
        page = explanation.write_page(result, options.out or plan.folder / "explain.html")
        yield f"{result}\n\nwritten: {page}"

    _show(options, answer)


def _demo(options: argparse.Namespace) -> None:
    from medquad_utils import demo, serving

    if bool(options.space) != bool(options.repo):
        raise CourseError("--space DIR and --repo USER/NAME go together: the Space shows a model.")
    if options.space and (options.host, options.port) != (serving.HOST, demo.PORT):
        raise CourseError("--space serves nothing: leave --host and --port out.")
    plan = _plan(options)
    if options.space:
        app, *others = (options.space / name for name in demo.SPACE_FILES)
        mark = "The chat of the QLoRA course as a Space; see medquad_utils"
        atomic.check_ours(app, mark, *others)
        folder = demo.write_space(options.space, options.repo, plan)
        print(f"written to {folder}: {', '.join(demo.SPACE_FILES)}")
        print(f"to create the Space: hf upload {options.repo}-demo {folder} --repo-type space")
        return
    port = serving.check_port(options.host, options.port)  # before a model is loaded
    demo.serve(demo.load(plan), options.host, port)


def _serve(options: argparse.Namespace) -> None:
    from medquad_utils import generation, serving

    port = serving.check_port(options.host, options.port)  # before a model is loaded
    plan = _plan(options)
    model, tokenizer = generation.load_tuned(plan), generation.load_tokenizer(plan)
    serving.serve(serving.Guard(plan, model, tokenizer), options.host, port)


def _publish(options: argparse.Namespace) -> None:
    from medquad_utils import publishing, report

    plan = _plan(options)
    folder = options.out or plan.folder / "published"
    atomic.check_ours(folder / "README.md", f"tags: [{publishing.TAG}, ", *folder.glob("*"))
    publishing.build(plan, options.repo, folder, options.merged, licence=options.licence)
    print(f"written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    for note in publishing.read_metrics(plan, plan.folder / "adapter").notes:
        print(f"{note}: the card says '{report.NOT_MEASURED}'. Lessons 01, 04 and 06 measure.")
    if options.dry_run:
        print("nothing was sent; without --dry-run the folder is made again, without your edits,")
        print(f"and goes to {options.repo}")
    else:
        print(f"published: {publishing.push(folder, options.repo)}")


def _estimate(options: argparse.Namespace) -> None:
    from medquad_utils import estimate

    checkpointing = {"off": False, "full": True}.get(options.checkpointing)
    result = estimate.estimate(
        options.profile, options.gpu, length=options.length, rank=options.rank,
        packing=options.packing, checkpointing=checkpointing, price=options.price,
        tokens=options.tokens, config=options.model,
    )  # fmt: skip
    print(result)
    if options.out:
        from medquad_utils import plots

        lines = {f"{result.card.name}, {result.card.memory_gb:g} GB": result.card.memory_gb}
        bars, title = {result.name: result.groups}, "Predicted memory of training"
        plots.stacked_bars(bars, title, "GB", lines, options.out)
        print(f"\nwritten: {options.out}")
