"""``medquad``: the thin command line. Imports what a command needs only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from medquad_utils import CourseError, __version__, machine, splits
from medquad_utils.profiles import PROFILES

HELP = "QLoRA on MedQuAD, from raw data to a 4-bit Llama that answers: run the lessons, ask the model, look at this machine."


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="medquad", description=HELP)
    top.add_argument("--version", action="version", version=f"medquad {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    profile = f"auto, {', '.join(PROFILES)}"

    commands.add_parser(
        "doctor", help="hardware, versions, Hub, token, and the profile that auto takes"
    )

    run = commands.add_parser("run", help="run the lessons with papermill")
    run.add_argument("--profile", default="auto", metavar="P", help=profile)
    run.add_argument(
        "--only", default="", metavar="02,04", help="numbers of the lessons to run (default: all)"
    )
    run.add_argument(
        "-p",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a notebook parameter, for example -p source=xml",
    )
    run.add_argument("--out", default="", metavar="DIR", help="where results go (default: runs)")

    class_ = commands.add_parser(
        "course",
        help="run all lessons on tiny, as make course does; --check: is this machine ready for a class?",
    )
    class_.add_argument(
        "--check",
        action="store_true",
        help="run nothing: look at packages, model, lessons, memory, disk and ports",
    )

    prepare = commands.add_parser(
        "data", help="load, clean and split MedQuAD, and count what leaks"
    )
    prepare.add_argument(
        "--source", default="sample", metavar="S", help="sample, hub, xml, csv, jsonl or parquet"
    )
    prepare.add_argument(
        "--path",
        default="",
        metavar="PATH",
        help="the folder or file of an xml, csv, jsonl or parquet source",
    )
    prepare.add_argument(
        "--out", default="", metavar="DIR", help="where the parts go (default: runs/tiny/data)"
    )
    prepare.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="RULE",
        help="a cleaning rule to leave out; may be repeated",
    )
    prepare.add_argument(
        "--specialty", default="", metavar="NAME", help="only a sub-corpus, for example cardiology"
    )
    prepare.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the split (default: 0)"
    )

    evaluate = commands.add_parser(
        "evaluate",
        help="score the tuned model on a file of questions, beside what needs no training",
    )
    evaluate.add_argument(
        "--questions",
        required=True,
        metavar="FILE",
        help="CSV, JSONL or parquet with the columns question and answer",
    )
    evaluate.add_argument(
        "--adapter", default="", metavar="DIR", help="the adapter (default: runs/<profile>/adapter)"
    )
    evaluate.add_argument(
        "--data",
        default="",
        metavar="DIR",
        help="folder of the train.parquet that the adapter was trained on",
    )
    evaluate.add_argument(
        "--archive", default="", metavar="FILE", help="further rows that the grounded arm may read"
    )
    evaluate.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help="where the results go (default: runs/<profile>/evaluation)",
    )
    evaluate.add_argument(
        "--profile",
        default="",
        metavar="P",
        help=f"{profile} (default: the adapter's own, or auto)",
    )
    evaluate.add_argument(
        "--limit",
        type=int,
        default=1000,
        metavar="N",
        help="questions at most, drawn if there are more (default: 1000)",
    )
    evaluate.add_argument(
        "--batch",
        type=int,
        default=32,
        metavar="N",
        help="questions answered at a time (default: 32)",
    )

    cost = commands.add_parser(
        "estimate",
        help="what training will cost: memory by part, tokens/s, minutes and price, on any card",
    )
    cost.add_argument(
        "--profile",
        default="llama-8b",
        metavar="P",
        help=f"{', '.join(PROFILES)} (default: llama-8b)",
    )
    cost.add_argument(
        "--gpu",
        default="T4",
        metavar="CARD",
        help="T4, L4, A10G, A100-40, A100-80, H100, H200, RTX 4090 or CPU (default: T4)",
    )
    cost.add_argument(
        "--length", type=int, default=0, metavar="N", help="tokens of a row (default: the plan's)"
    )
    cost.add_argument(
        "--rank", type=int, default=0, metavar="R", help="of the adapters (default: the profile's)"
    )
    cost.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="short rows share a long one (default: they do)",
    )
    cost.add_argument(
        "--checkpointing",
        default="",
        metavar="C",
        help="off, full, or N for every N-th block (default: the plan's)",
    )
    cost.add_argument(
        "--price",
        type=float,
        default=0.0,
        metavar="X",
        help="of the card for an hour (default: no price is shown)",
    )
    cost.add_argument(
        "--tokens",
        type=int,
        default=0,
        metavar="N",
        help="real tokens of an epoch (default: MedQuAD's training part)",
    )
    cost.add_argument(
        "--config", default="", metavar="PATH", help="another Llama's config.json, or its folder"
    )
    cost.add_argument(
        "--out", default="", metavar="FILE.png", help="also draw the memory as a picture"
    )

    publish = commands.add_parser(
        "publish", help="build the folder with card and licences, and push it to the Hub"
    )
    publish.add_argument(
        "--repo",
        required=True,
        metavar="USER/NAME",
        help="the repository; of a Llama 3 the NAME begins with llama-3",
    )
    publish.add_argument("--profile", default="auto", metavar="P", help=profile)
    publish.add_argument(
        "--runs", default="", metavar="DIR", help="where results are (default: runs)"
    )
    publish.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help="where the folder goes (default: runs/<profile>/published)",
    )
    publish.add_argument(
        "--merged", action="store_true", help="base and adapter as one model (always so for tiny)"
    )
    publish.add_argument(
        "--licence",
        default="",
        metavar="FILE",
        help="a copy of the base's agreement, where its licence asks for one",
    )
    publish.add_argument(
        "--dry-run", action="store_true", help="build and check the folder, send nothing"
    )

    ask = commands.add_parser("ask", help="ask the tuned model one question")
    ask.add_argument("question")
    ask.add_argument("--profile", default="auto", metavar="P", help=profile)
    ask.add_argument("--out", default="", metavar="DIR", help="where results are (default: runs)")

    explain = commands.add_parser(
        "explain",
        help="answer one question, with sources and what the answer hangs on, as one HTML page",
    )
    explain.add_argument("question")
    explain.add_argument("--profile", default="auto", metavar="P", help=profile)
    explain.add_argument(
        "--runs", default="", metavar="DIR", help="where results are (default: runs)"
    )
    explain.add_argument(
        "--out",
        default="",
        metavar="FILE.html",
        help="the page (default: runs/<profile>/explain.html)",
    )

    talk = commands.add_parser(
        "demo",
        help="chat with the tuned model in a browser, on this machine; or the folder of a Space",
    )
    talk.add_argument("--profile", default="auto", metavar="P", help=profile)
    talk.add_argument("--runs", default="", metavar="DIR", help="where results are (default: runs)")
    talk.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="address to listen on (default: 127.0.0.1, this machine only)",
    )
    talk.add_argument(
        "--port", type=int, default=7860, metavar="N", help="port to listen on (default: 7860)"
    )
    talk.add_argument(
        "--space",
        default="",
        metavar="DIR",
        help="serve nothing: write the folder of a Hugging Face Space instead",
    )
    talk.add_argument(
        "--repo",
        default="",
        metavar="USER/NAME",
        help="the published model that the Space shows (with --space)",
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a mistake of the user's ends in one line on stderr and exit status 1."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait without spinning: a tenth slower on idle cores, more than twice as fast on shared ones (measured on two).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = {
            "doctor": _doctor,
            "run": _run,
            "course": _course,
            "data": _data,
            "evaluate": _evaluate,
            "estimate": _estimate,
            "ask": _ask,
            "explain": _explain,
            "publish": _publish,
            "demo": _demo,
        }[options.command](options)
        sys.stdout.flush()  # a closed pipe shows here, not after the last line of Python
        return status
    except CourseError as error:
        print(f"medquad: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = error.filename or "no file named"
        print(
            f"medquad: {error.strerror or error}: {where}. Check --out and the space on the disk.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nmedquad: stopped; what was written before is whole.", file=sys.stderr)
        return 130


def _doctor(options: argparse.Namespace) -> int:
    from medquad_utils import profiles

    hardware = machine.detect()
    reachable = machine.hub_reachable()
    token = machine.hub_token() is not None
    gap = "" if token else machine.token_gap()
    name, why = profiles.choose(hardware, reachable, token, gap)
    lines = {
        "device": f"{hardware.device}: {hardware.name}, {hardware.memory_gb:.0f} GB, {hardware.cores} cores",
        "CUDA capability": ".".join(map(str, hardware.capability))
        if hardware.capability
        else "no CUDA GPU",
        "bf16 on the CPU": "yes" if hardware.bf16_cpu else "no (fp32 is used instead)",
        "Hugging Face Hub": "reachable" if reachable else "out of reach",
        "HF_TOKEN": "set" if token else gap or "not set",
        **machine.versions(),
        "auto takes": f"{name} ({why.removeprefix('auto: ')})",
    }
    width = max(map(len, lines))
    print("\n".join(f"{k:<{width}}  {v}" for k, v in lines.items()))
    print("\n" + str(profiles.resolve(name, hardware=hardware)))
    return 0


def _run(options: argparse.Namespace) -> int:
    from medquad_utils import course

    wrong = [pair for pair in options.p if "=" not in pair]
    if wrong:
        raise CourseError(f"-p {wrong[0]!r}: expected NAME=VALUE, for example -p source=xml.")
    only = [number for number in options.only.split(",") if number]
    course.run(options.profile, only, dict(pair.split("=", 1) for pair in options.p), options.out)
    return 0


def _course(options: argparse.Namespace) -> int:
    if not options.check:
        from medquad_utils import course

        course.run("tiny")
        return 0
    from medquad_utils import readiness

    found = readiness.check()
    print(readiness.table(found))
    return int(any(finding.state == readiness.PROBLEM for finding in found))


def _data(options: argparse.Namespace) -> int:
    from pathlib import Path

    from medquad_utils import data, profiles

    plan = profiles.resolve(
        "tiny", source=options.source, data_path=options.path, seed=options.seed
    )
    folder = Path(options.out) if options.out else plan.folder / "data"
    _, card = data.make(plan, folder, options.without, options.specialty)
    print(data.summary(card))
    print(
        f"\nwritten to {folder}: {', '.join(f'{part}.parquet' for part in splits.PARTS)}, leakage.json, data.json"
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from pathlib import Path

    from medquad_utils import questions

    if options.limit < 1 or options.batch < 1:
        raise CourseError(
            f"--limit {options.limit}, --batch {options.batch}: expected whole numbers over 0."
        )
    asked = questions.read_questions(
        Path(options.questions), options.limit
    )  # before a model is loaded: most mistakes are here
    print(asked)
    from transformers.utils import logging

    from medquad_utils import data, evaluation, report

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    plan, adapter = evaluation.plan_of(options.profile, options.adapter)
    given = Path(options.data) if options.data else None
    train, validation = (
        evaluation.training_rows(plan, adapter, given, part) for part in ("train", "validation")
    )
    archive = data.load_table(Path(options.archive)).rows if options.archive else []
    folder = Path(options.out) if options.out else plan.folder / "evaluation"
    metrics = evaluation.evaluate(
        plan, asked, train, folder, adapter, archive, validation, options.batch
    )
    page, text = report.write(metrics, folder)
    print(report.table(metrics))
    print(f"\nwritten: {page}, {text.name}, metrics.json, answers.parquet")
    return 0


def _estimate(options: argparse.Namespace) -> int:
    from pathlib import Path

    from medquad_utils import estimate

    words = {"": None, "off": 0, "full": 1}
    every = options.checkpointing
    if every not in words and not (every.isdecimal() and int(every)):
        raise CourseError(
            f"--checkpointing {every!r}: expected off, full, or a whole number N for every N-th block."
        )
    if options.out and Path(options.out).suffix != ".png":
        raise CourseError(
            f"--out {options.out!r}: expected the name of a picture that ends in .png."
        )
    found = estimate.estimate(
        options.profile, options.gpu, length=options.length, rank=options.rank, packing=options.packing,
        checkpointing=words[every] if every in words else int(every),
        price=options.price, tokens=options.tokens, config=options.config,
    )  # fmt: skip
    print(found)
    if options.out:
        from medquad_utils import plots

        card = f"{found.card.name}, {found.card.memory_gb:g} GB"
        alt = f"A stacked bar of {found.memory_gb:.2f} GB that training {found.name} takes, beside a dashed line for the {card}."
        plots.stacked_bars(
            {found.name: found.groups},
            "Predicted memory of training",
            "GB",
            alt,
            {card: found.card.memory_gb},
            Path(options.out),
        )
        print(f"\nwritten: {Path(options.out).name}")
    return 0


def _publish(options: argparse.Namespace) -> int:
    from pathlib import Path

    from medquad_utils import profiles, publishing

    plan = profiles.resolve(options.profile, out=options.runs)
    publishing.check_name(options.repo, plan.model_id)  # before a model is loaded
    from transformers.utils import logging

    from medquad_utils import model_card

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(options.out) if options.out else plan.folder / "published"
    licence = Path(options.licence) if options.licence else None
    publishing.build(plan, options.repo, folder, options.merged, licence=licence)
    print(f"written to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    for note in model_card.read_metrics(plan, plan.folder / "adapter").notes:
        print(f"{note}: there the card says '{model_card.MISSING}'. Lessons 01, 04 and 06 measure.")
    if options.dry_run:
        print(f"nothing was sent; without --dry-run it goes to {options.repo}")
        return 0
    print(f"published: {publishing.push(folder, options.repo)}")
    return 0


def _ask(options: argparse.Namespace) -> int:
    from medquad_utils import profiles

    if not options.question.strip():
        raise CourseError(
            'the question is empty: ask one in quotes, for example medquad ask "What causes asthma?"'
        )
    plan = profiles.resolve(options.profile, out=options.out)
    from transformers.utils import logging

    from medquad_utils.chat import NOTICE
    from medquad_utils.generation import check_adapter, load_tokenizer, load_tuned, stream

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_adapter(plan, plan.folder / "adapter")
    model, tokenizer = load_tuned(plan), load_tokenizer(plan)
    for piece in stream(model, tokenizer, options.question, plan.max_new_tokens):
        print(piece, end="", flush=True)
    print(f"\n\n{NOTICE}")
    if plan.model_id == "embedded":
        print(
            "This is the embedded tiny model: it shows the method on a few short facts, and knows nothing else."
        )
    return 0


def _explain(options: argparse.Namespace) -> int:
    from pathlib import Path

    if not options.question.strip():
        raise CourseError(
            'the question is empty: ask one in quotes, for example medquad explain "What causes asthma?"'
        )
    if options.out and Path(options.out).suffix != ".html":
        raise CourseError(f"--out {options.out!r}: expected the name of a page that ends in .html.")
    from medquad_utils import profiles

    plan = profiles.resolve(options.profile, out=options.runs)
    from transformers.utils import logging

    from medquad_utils import explanation, generation

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    generation.check_adapter(plan, plan.folder / "adapter")
    found = explanation.explain(plan, options.question)
    page = explanation.write_page(
        found, Path(options.out) if options.out else plan.folder / "explain.html"
    )
    print(f"{found}\n\nwritten: {page.name}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from pathlib import Path

    from medquad_utils import profiles

    if bool(options.space) != bool(options.repo):
        raise CourseError(
            "--space DIR and --repo USER/NAME go together: the folder to write, and the published model that it shows."
        )
    plan = profiles.resolve(options.profile, out=options.runs)
    from transformers.utils import logging

    from medquad_utils import demo

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.space:
        folder = demo.write_space(Path(options.space), options.repo, plan)
        print(f"written to {folder}: {', '.join(demo.SPACE_FILES)}")
        print(f"to make a Space of it: hf upload {options.repo}-demo {folder} --repo-type space")
        return 0
    demo.check_port(options.host, options.port)  # before a model is loaded
    demo.serve(demo.load(plan), options.host, options.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
