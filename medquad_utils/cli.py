"""``medquad``: the thin command line. Imports what a command needs only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from medquad_utils import __version__
from medquad_utils.profiles import PROFILES, CourseError

HELP = "QLoRA on MedQuAD, from raw data to a 4-bit Llama that answers: run the lessons, ask the model, look at this machine."


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="medquad", description=HELP)
    top.add_argument("--version", action="version", version=f"medquad {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    profile = f"auto, {', '.join(PROFILES)}"

    commands.add_parser("doctor", help="hardware, versions, Hub, token, and the profile that auto takes")

    run = commands.add_parser("run", help="run the lessons with papermill")
    run.add_argument("--profile", default="auto", metavar="P", help=profile)
    run.add_argument("--only", default="", metavar="02,04", help="numbers of the lessons to run (default: all)")
    run.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", help="a notebook parameter, for example -p source=xml")
    run.add_argument("--out", default="", metavar="DIR", help="where results go (default: runs)")

    prepare = commands.add_parser("data", help="load, clean and split MedQuAD, and count what leaks")
    prepare.add_argument("--source", default="sample", metavar="S", help="sample, hub, xml, csv, jsonl or parquet")
    prepare.add_argument("--path", default="", metavar="PATH", help="the folder or file of an xml, csv, jsonl or parquet source")
    prepare.add_argument("--out", default="", metavar="DIR", help="where the parts go (default: runs/tiny/data)")
    prepare.add_argument("--without", action="append", default=[], metavar="RULE", help="a cleaning rule to leave out; may be repeated")
    prepare.add_argument("--specialty", default="", metavar="NAME", help="only a sub-corpus, for example cardiology")
    prepare.add_argument("--seed", type=int, default=0, metavar="N", help="of the split (default: 0)")

    evaluate = commands.add_parser("evaluate", help="score the tuned model on a file of questions, beside what needs no training")
    evaluate.add_argument("--questions", required=True, metavar="FILE", help="CSV, JSONL or parquet with the columns question and answer")
    evaluate.add_argument("--adapter", default="", metavar="DIR", help="the adapter (default: runs/<profile>/adapter)")
    evaluate.add_argument("--data", default="", metavar="DIR", help="folder of the train.parquet that the adapter was trained on")
    evaluate.add_argument("--archive", default="", metavar="FILE", help="further rows that the grounded arm may read")
    evaluate.add_argument("--out", default="", metavar="DIR", help="where the results go (default: runs/<profile>/evaluation)")
    evaluate.add_argument("--profile", default="", metavar="P", help=f"{profile} (default: the adapter's own, or auto)")
    evaluate.add_argument("--limit", type=int, default=1000, metavar="N", help="questions at most, drawn if there are more (default: 1000)")
    evaluate.add_argument("--batch", type=int, default=32, metavar="N", help="questions answered at a time (default: 32)")

    ask = commands.add_parser("ask", help="ask the tuned model one question")
    ask.add_argument("question")
    ask.add_argument("--profile", default="auto", metavar="P", help=profile)
    ask.add_argument("--out", default="", metavar="DIR", help="where results are (default: runs)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a mistake of the user's ends in one line on stderr and exit status 1."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait without spinning: a tenth slower on idle cores, more than twice as fast on shared ones (measured on two).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = {"doctor": _doctor, "run": _run, "data": _data, "evaluate": _evaluate, "ask": _ask}[options.command](options)
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
        print(f"medquad: {error.strerror or error}: {where}. Check --out and the space on the disk.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmedquad: stopped; what was written before is whole.", file=sys.stderr)
        return 130


def _doctor(options: argparse.Namespace) -> int:
    from medquad_utils import profiles

    hardware = profiles.detect()
    reachable = profiles.hub_reachable()
    token = profiles.hub_token() is not None
    name, why = profiles.choose(hardware, reachable, token)
    lines = {
        "device": f"{hardware.device}: {hardware.name}, {hardware.memory_gb:.0f} GB, {hardware.cores} cores",
        "CUDA capability": ".".join(map(str, hardware.capability)) if hardware.capability else "no CUDA GPU",
        "bf16 on the CPU": "yes" if hardware.bf16_cpu else "no (fp32 is used instead)",
        "Hugging Face Hub": "reachable" if reachable else "out of reach",
        "HF_TOKEN": "set" if token else "not set",
        **profiles.versions(),
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


def _data(options: argparse.Namespace) -> int:
    from pathlib import Path

    from medquad_utils import data, profiles

    plan = profiles.resolve("tiny", source=options.source, data_path=options.path, seed=options.seed)
    folder = Path(options.out) if options.out else plan.folder / "data"
    _, card = data.make(plan, folder, options.without, options.specialty)
    print(data.summary(card))
    print(f"\nwritten to {folder}: {', '.join(f'{part}.parquet' for part in data.PARTS)}, leakage.json, data.json")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from pathlib import Path

    from medquad_utils import questions

    if options.limit < 1 or options.batch < 1:
        raise CourseError(f"--limit {options.limit}, --batch {options.batch}: expected whole numbers over 0.")
    asked = questions.read_questions(Path(options.questions), options.limit)  # before a model is loaded: most mistakes are here
    print(asked)
    from transformers.utils import logging

    from medquad_utils import data, evaluation, report

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    plan, adapter = evaluation.plan_of(options.profile, options.adapter)
    given = Path(options.data) if options.data else None
    train, validation = (evaluation.training_rows(plan, adapter, given, part) for part in ("train", "validation"))
    archive = data.load_table(Path(options.archive)).rows if options.archive else []
    folder = Path(options.out) if options.out else plan.folder / "evaluation"
    metrics = evaluation.evaluate(plan, asked, train, folder, adapter, archive, validation, options.batch)
    page, text = report.write(metrics, folder)
    print(report.table(metrics))
    print(f"\nwritten: {page}, {text.name}, metrics.json, answers.parquet")
    return 0


def _ask(options: argparse.Namespace) -> int:
    from medquad_utils import profiles

    if not options.question.strip():
        raise CourseError('the question is empty: ask one in quotes, for example medquad ask "What causes asthma?"')
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
        print("This is the embedded tiny model: it shows the method on a few short facts, and knows nothing else.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
