"""Publish an adapter on the Hub: folder, model card, licences, a check for secrets, the push."""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medquad_utils import CourseError
from medquad_utils.chat import NOTICE, SYSTEM_PROMPT, THREE_QUESTIONS
from medquad_utils.files import read_json, whole_folder, write_json
from medquad_utils.machine import hub_token
from medquad_utils.profiles import Plan
from medquad_utils.report import EMBEDDED, escaped, number, sentence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The only names in a published folder: no pickle, no optimizer state, no file of another program.
FILES = re.compile(
    r"(adapter_|generation_)?config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors"
    r"(\.index\.json)?|(tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template\.jinja|"
    r"README\.md|LICENSE|NOTICE"
)
NEEDED = "generation_config.json tokenizer.json tokenizer_config.json README.md LICENSE NOTICE"
INCOMPLETE = "THIS FILE IS A PLACEHOLDER"  # the first words of a LICENSE without the agreement
ROUTE = "dequantised"  # the merged route with the smallest drift
TEMPLATE = Path(__file__).with_name("assets") / "card.md.jinja"
MISSING = "not measured"
TAG = "medquad-qlora"  # in every card: a later push recognises the repository by it
COURSE = "https://github.com/medquad-qlora/medquad-qlora"
HUB_DATA = "keivalya/MedQuad-MedicalQnADataset"
DOI = "10.1186/s12859-019-3119-4"
PAPER = (
    "Asma Ben Abacha and Dina Demner-Fushman, A Question-Entailment Approach to Question "
    f"Answering, BMC Bioinformatics 2019, 20:511, https://doi.org/{DOI}"
)
COLUMNS = ("base", "tuned", "nearest", "another disease")
SHOWN = (
    "facts_complete", "rougeL", "rouge1", "rouge2", "bleu", "chrf", "tfidf_cosine", "bert_score",
    "stop_rate", "length_ratio", "repetition", "bits_per_byte",
)  # fmt: skip
# Score -> the Hub's name of the metric. The card's metadata hold only these.
HUB_METRICS = {"rougeL": "rouge", "rouge1": "rouge", "rouge2": "rouge", "bleu": "bleu",
               "chrf": "chrf", "bert_score": "bertscore"}  # fmt: skip


# ---- licences -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Licence:
    """What the licence of a base requires of a model derived from it."""

    id: str  # in the Hub's list of licences
    name: str
    url: str
    agreement: str = ""  # title of the agreement that must be copied along; "" = none
    notice: str = ""  # required text of NOTICE
    built: str = ""  # required words in the card


def _llama(version: str, name: str, id: str, url: str, built: str) -> Licence:
    rights = "Copyright © Meta Platforms, Inc. All Rights Reserved."
    notice = f"{version} is licensed under the {version} Community License, {rights}"
    return Licence(id, name, url, f"{version} COMMUNITY LICENSE AGREEMENT".upper(), notice, built)


LICENCES = {
    licence.id: licence
    for licence in (
        Licence("apache-2.0", "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
        _llama("Meta Llama 3", "Meta Llama 3 Community License", "llama3",
               "https://llama.meta.com/llama3/license/", "Built with Meta Llama 3"),
        _llama("Llama 3.2", "Llama 3.2 Community License", "llama3.2",
               "https://www.llama.com/llama3_2/license/", "Built with Llama"),
    )
}  # fmt: skip


def licence_of(model_id: str) -> Licence:
    """Return the licence that a model derived from ``model_id`` inherits."""
    name = model_id.lower()
    if "llama-3" not in name:
        return LICENCES["apache-2.0"]  # the course's other bases
    return LICENCES["llama3.2" if "llama-3.2" in name else "llama3"]


def check_name(repo: str, model_id: str) -> None:
    """Check the repository name: valid on the Hub, and allowed by the base model's licence."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        user, name = repo.split("/")
    except (HFValidationError, ValueError) as error:
        raise CourseError(
            f"--repo {repo!r}: expected USER/NAME, of letters, digits, '-', '_' and '.', "
            "for example me/my-model."
        ) from error
    licence = licence_of(model_id)
    if licence.agreement and not re.match(r"llama[-_. ]?3", name, re.IGNORECASE):
        raise CourseError(
            f"--repo {repo!r}: {model_id} is under the {licence.name}, so the name of a derived "
            f"model must begin with 'Llama 3'. Take for example {user}/llama-3-medquad-qlora."
        )


def agreement(plan: Plan, revision: str = "", given: Path | None = None) -> str:
    """Return the text of LICENSE: the base's agreement from ``given`` or the cache.

    Where this machine does not have the agreement, a placeholder says how to add it.
    """
    from huggingface_hub import try_to_load_from_cache

    licence, names = licence_of(plan.model_id), ("LICENSE", "LICENSE.txt")
    if not licence.agreement:
        return _apache()
    if plan.model_path:
        cached: list[Any] = [Path(plan.model_path) / name for name in names]
    else:
        cached = [
            try_to_load_from_cache(plan.model_id, n, revision=revision or None) for n in names
        ]
    for path in [given] if given else [p for p in cached if isinstance(p, str | Path)]:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            text = ""
        if licence.agreement in " ".join(text.upper().split()) and INCOMPLETE not in text:
            return text
    if given:
        raise CourseError(
            f"--licence {given.name} is not the {licence.name}: expected a text with the title "
            f"{licence.agreement}."
        )
    return (
        f"{INCOMPLETE}\n\nThis model is derived from {plan.model_id}, under the {licence.name}.\n"
        f"Full agreement: {licence.url}\nand the file LICENSE (or LICENSE.txt) of "
        f"https://huggingface.co/{plan.model_id}\n\nEvery copy of the model needs a copy of the "
        "agreement. Put that file in place of this one\nbefore you pass the folder on: "
        "medquad publish ... --licence FILE\n"
    )


def _apache() -> str:
    """Return the Apache License of the checkout or the installed package, else its address."""
    if (file := Path(__file__).parent.parent / "LICENSE").is_file():
        return file.read_text(encoding="utf-8")
    try:
        text = importlib.metadata.distribution("medquad-qlora").read_text("licenses/LICENSE")
    except importlib.metadata.PackageNotFoundError:
        text = None
    return text or f"Licensed under the Apache License, Version 2.0: {LICENCES['apache-2.0'].url}\n"


def notice(plan: Plan, source: str) -> str:
    """Return the text of NOTICE: the line of the base's licence, the base, and the data."""
    licence = licence_of(plan.model_id)
    embedded = plan.model_id == "embedded"
    address = f"https://huggingface.co/{plan.model_id}"
    base = "the embedded base of the QLoRA course" if embedded else address
    derived = f"Derived from {base} ({licence.name})."
    lines = [licence.notice, licence.built, derived, attribution(source)]
    return "\n\n".join(filter(None, lines)) + "\n"


def attribution(source: str) -> str:
    """Return the attribution of the training data that CC BY 4.0 requires."""
    medquad = (
        f"MedQuAD, https://github.com/abachaa/MedQuAD: {PAPER}. "
        "Licence: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/."
    )
    if source == "sample":
        return f"Trained on the course's own sample (CC BY 4.0, {COURSE}), in the form of {medquad}"
    return f"Trained on {medquad} Changes: cleaned, split by disease, long rows left out."


# ---- the card -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """The measurements of one adapter; what was not measured is empty."""

    plan: dict[str, Any]  # the plan it was trained with
    train: dict[str, Any]
    data: dict[str, Any]
    evaluation: dict[str, Any]
    notes: tuple[str, ...]  # why something is left out


def read_metrics(plan: Plan, adapter: Path) -> Metrics:
    """Read the metrics under ``plan.folder`` that belong to this adapter and to no other.

    Training metrics must come from the adapter's plan; an evaluation must name its weights.
    """
    trained, folder, notes = _json(adapter / "plan.json"), plan.folder, []
    train, data = (_json(folder / "metrics" / f"{name}.json") for name in ("train", "explore"))
    paths = {"model_path", "data_path", "out"}  # written relative to different folders
    shared = (train.get("plan", {}).keys() & trained.keys()) - paths
    if any(trained[key] != train["plan"][key] for key in shared):
        train = {}
        notes.append("metrics/train.json is of another training")
    evaluation = _json(folder / "evaluation" / "metrics.json")
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]
    if evaluation and evaluation.get("recipe", {}).get("adapter") != digest:
        evaluation = {}
        notes.append("evaluation/metrics.json is of another adapter")
    elif not evaluation:
        evaluation = _nested(_json(folder / "metrics" / "evaluate.json"))
    parts = {"training": train, "data": data, "evaluation": evaluation}
    notes += [f"no metrics of the {name}" for name, values in parts.items() if not values]
    return Metrics(trained or train.get("plan", {}), train, data, evaluation, tuple(notes))


def _json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bring lesson 06's short record (score_column: mean) into the shape of an evaluation."""
    if not values:
        return {}
    keys = {(c, s): f"{s}_{c.replace(' ', '_')}" for c in COLUMNS for s in SHOWN}
    arms: dict[str, dict[str, Any]] = {column: {} for column in COLUMNS}
    for (column, score), key in keys.items():
        if key in values:
            arms[column][score] = {"mean": values[key], "low": None, "high": None}
    kept = {key: values.get(key) for key in ("questions", "held_out")}
    return kept | {"overall": {"arms": arms}}


def _value(record: Any, *keys: str) -> str:
    """Return the value under ``keys`` as escaped Markdown, or "not measured"."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    if record is None or isinstance(record, Mapping):
        return MISSING
    return escaped(number(record))


def _interval(cells: Mapping[str, Any] | None) -> str:
    if not cells:
        return MISSING
    low, high = cells["low"], cells["high"]
    bounds = "" if low is None else f" [{number(low)}, {number(high)}]"
    return escaped(f"{number(cells['mean'])}{bounds}")


def card(repo: str, plan: Plan, metrics: Metrics, merged: bool, revision: str) -> str:
    """Return the README.md of ``repo``, with metadata.

    ``merged``: a whole model, else an adapter of ``plan.model_id`` at commit ``revision``.
    """
    from huggingface_hub import ModelCard

    from medquad_utils.scores import SCORES

    source = str(metrics.plan.get("source", plan.source))
    text = ModelCard.from_template(
        _metadata(repo, plan, metrics, merged, source), template_path=str(TEMPLATE), repo=repo,
        plan=plan, merged=merged, revision=revision, licence=licence_of(plan.model_id),
        embedded=plan.model_id == "embedded", source=source, data_name=_data_name(source),
        attribution=attribution(source), notice=NOTICE, embedded_notice=EMBEDDED,
        system_prompt=SYSTEM_PROMPT, question=THREE_QUESTIONS[0], course=COURSE, paper=PAPER,
        doi=DOI, missing=MISSING, columns=COLUMNS, shown=SHOWN, scores=SCORES, value=_value,
        interval=_interval, sentence=sentence, escaped=escaped, trained=metrics.plan,
        train=metrics.train, data=metrics.data, evaluation=metrics.evaluation,
        safety=metrics.evaluation.get("safety", {}),
    )  # fmt: skip
    return f"{text}\n"


def _metadata(repo: str, plan: Plan, metrics: Metrics, merged: bool, source: str) -> Any:
    from huggingface_hub import ModelCardData

    hub, results = plan.model_id != "embedded", eval_results(metrics)
    data = ModelCardData(
        language="en", license=licence_of(plan.model_id).id, pipeline_tag="text-generation",
        library_name="transformers" if merged else "peft",
        tags=[TAG, "qlora", "lora", "medical", "question-answering", "medquad"],
        base_model=plan.model_id if hub else None, datasets=[HUB_DATA] if source == "hub" else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=repo.split("/")[-1], eval_results=results or None,
    )  # fmt: skip
    relation = "finetune" if merged else "adapter"
    data["base_model_relation"] = relation if hub else None  # ModelCardData has no argument for it
    return data


def eval_results(metrics: Metrics) -> list[Any]:
    """Return the tuned model's scores for the Hub's model-index, intervals in ``metric_args``."""
    from huggingface_hub import EvalResult

    from medquad_utils.scores import SCORES

    source = metrics.plan.get("source", "")
    held = {None: "leakage not measured", True: "held out by disease", False: "not held out"}
    arms = metrics.evaluation.get("overall", {}).get("arms", {})
    scores = {name: cells for name, cells in arms.get("tuned", {}).items() if name in HUB_METRICS}
    return [
        EvalResult(
            task_type="text-generation", dataset_name=_data_name(source),
            dataset_type={"hub": HUB_DATA, "sample": "course-sample"}.get(source, "medquad"),
            dataset_split=held[metrics.evaluation.get("held_out")], metric_type=HUB_METRICS[name],
            metric_name=SCORES[name].name, metric_value=cells["mean"],
            metric_args=None if cells["low"] is None else {
                "interval_95": [cells["low"], cells["high"]]
            },
        )
        for name, cells in scores.items()
    ]  # fmt: skip


def _data_name(source: str) -> str:
    return "the course's sample, written in MedQuAD's form" if source == "sample" else "MedQuAD"


# ---- the folder ---------------------------------------------------------------------------------


def build(
    plan: Plan, repo: str, folder: Path, merged: bool = False, adapter: Path | None = None,
    licence: Path | None = None,
) -> Path:  # fmt: skip
    """Write the folder for the Hub, whole or not at all, replacing an older one.

    It holds the adapter, or base and adapter merged (``merged``, and always where the base is not
    on the Hub), with tokenizer, generation config, card, LICENSE (of ``licence``) and NOTICE.
    """
    from medquad_utils.generation import check_adapter, load_tokenizer
    from medquad_utils.merging import check_folder

    check_name(repo, plan.model_id)
    source = adapter or plan.folder / "adapter"
    check_adapter(plan, source)
    check_folder(folder, FILES)
    merged = merged or not plan.on_hub
    revision = base_revision(plan) if plan.on_hub else ""
    texts = {"LICENSE": agreement(plan, revision, licence)}
    write = _write_model if merged else _write_adapter
    try:
        with whole_folder(folder) as fresh:
            write(plan, load_tokenizer(plan), source, fresh)
            metrics = read_metrics(plan, source)
            texts["README.md"] = card(repo, plan, metrics, merged, revision)
            texts["NOTICE"] = notice(plan, metrics.plan.get("source", plan.source))
            for name, text in texts.items():
                (fresh / name).write_text(text, encoding="utf-8")
            for file in fresh.iterdir():
                file.chmod(0o644)  # safetensors writes 600, which another account cannot serve
            check(fresh, repo)
    except OSError as error:
        reason = f"{error.strerror or error}. Nothing was changed; free some disk space"
        raise CourseError(f"cannot write {folder.name}/: {reason}.") from error
    return folder


def base_revision(plan: Plan) -> str:
    """Return the commit of the base that the plan pins, or else the cached one."""
    from huggingface_hub import constants

    if plan.revision:
        return plan.revision
    cached = Path(constants.HF_HUB_CACHE) / f"models--{plan.model_id.replace('/', '--')}"
    if (record := cached / "refs" / "main").is_file():
        return record.read_text(encoding="utf-8").strip()
    raise CourseError(
        f"the commit of {plan.model_id} is unknown: load the base once (medquad ask), then publish."
    )


def _write_model(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, adapter: Path, folder: Path
) -> None:
    from medquad_utils import merging

    merging.save(merging.merge(plan, ROUTE, adapter), tokenizer, folder)


def _write_adapter(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, adapter: Path, folder: Path
) -> None:
    from transformers import GenerationConfig

    from medquad_utils.chat import end_ids

    folder.mkdir()
    config = read_json(adapter / "adapter_config.json")  # may name a folder of this machine
    config |= {"base_model_name_or_path": plan.model_id, "revision": base_revision(plan)}
    write_json(folder / "adapter_config.json", config)
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    tokenizer.padding_side = "left"  # for generation
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    ).save_pretrained(folder)


# ---- the check before the push ------------------------------------------------------------------

SECRETS = {
    "a token of the Hub": re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}"),
    "a token of GitHub": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}"),
    "an access key": re.compile(
        r"\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    ),
}
PATHS = re.compile(
    r"(?<![\w.:/])(/(home|Users|root|tmp|mnt|data|workspace|work|content|kaggle|scratch|private|"
    r"var/folders)/[\w.@-]+)|\b[A-Za-z]:\\+Users\\+\w+"
)
# User names that are common words, or shared by many machines: in a text they identify nobody.
COMMON = {"root", "user", "admin", "ubuntu", "jupyter", "runner", "model", "data", "will", "may"}


def scan(folder: Path, repo: str) -> None:
    """Check every text and weights header for strange files, local paths, the user name, tokens.

    The message names the file and never shows a secret. A tokenizer's vocabulary and the licence
    may contain any word: there, only tokens and this machine's own folders count.
    """
    secrets, paths, words = dict(SECRETS), dict[str, re.Pattern[str]](), {"a local path": PATHS}
    if token := hub_token():
        secrets["your Hub token"] = re.compile(re.escape(token))
    own = [str(p) for p in (Path.home(), Path.cwd(), folder.resolve().parent) if len(p.parts) > 2]
    if own:
        paths["a path of this machine"] = re.compile("|".join(map(re.escape, own)))
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without a user database
        user = ""
    if len(user) > 2 and user.lower() not in COMMON:
        words["your user name"] = re.compile(rf"(?<!\w){re.escape(user)}(?!\w)", re.IGNORECASE)
    for file in sorted(folder.rglob("*")):
        where = file.relative_to(folder).as_posix()
        if file.is_symlink() or not file.is_file() or not FILES.fullmatch(where):
            raise CourseError(
                f"{where} does not belong in a published model: remove it from {folder.name}/."
            )
        text = _text(file).replace(repo, "")
        patterns = secrets | paths | ({} if where in ("tokenizer.json", "LICENSE") else words)
        for what, pattern in patterns.items():
            if match := pattern.search(text):
                if what in secrets:
                    raise CourseError(f"{where} holds {what}: remove it, and renew it on its site.")
                raise CourseError(f"{where} holds {what} ({match.group()}): remove it.")


def _text(file: Path) -> str:
    """Return the text of a file; of weights, the header (names, shapes, remarks)."""
    if file.suffix != ".safetensors":
        return file.read_text(encoding="utf-8", errors="replace")
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return opened.read(min(size, 100_000_000)).decode("utf-8", "replace")


def check(folder: Path, repo: str) -> None:
    """Check that a folder is complete, keeps its licences, and holds no secret (``scan``)."""
    from huggingface_hub import ModelCard

    missing = [name for name in NEEDED.split() if not (folder / name).is_file()]
    if missing or not any(folder.glob("*.safetensors")):
        raise CourseError(
            f"{folder.name}/ lacks {missing[0] if missing else 'weights in safetensors'}: "
            "build it with medquad publish --dry-run."
        )
    scan(folder, repo)
    text, credits = ((folder / n).read_text(encoding="utf-8") for n in ("README.md", "NOTICE"))
    data, config = ModelCard(text).data, folder / "adapter_config.json"
    base = _json(config)
    licence = LICENCES.get(str(data.get("license")))
    if licence is None or TAG not in (data.get("tags") or []):
        raise CourseError("README.md is no card of medquad publish: build the folder again.")
    if licence.agreement:
        check_name(repo, str(data.get("base_model") or ""))
    problems = {
        f"README.md and NOTICE must attribute MedQuAD (doi {DOI}, CC BY 4.0)":
            DOI not in text or DOI not in credits,
        f"README.md must say '{licence.built}' and NOTICE hold Meta's line ({licence.name})":
            licence.built not in text or licence.notice not in credits,
        "adapter_config.json must name the Hub id and the revision of its base":
            config.is_file() and not (base.get("base_model_name_or_path") == data.get("base_model")
                                      and base.get("revision")),
        **_end_problems(folder),
    }  # fmt: skip
    for problem, present in problems.items():
        if present:
            raise CourseError(f"{problem}: build the folder again.")


def _end_problems(folder: Path) -> dict[str, bool]:
    """Return whether answers run past an end token or are padded with one."""
    from transformers import AutoTokenizer, GenerationConfig

    from medquad_utils.chat import end_ids

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = GenerationConfig.from_pretrained(folder)
    given = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [tokenizer.convert_ids_to_tokens(i) for i in end_ids(tokenizer) if i not in given]
    name, pad = "generation_config.json", config.pad_token_id
    return {
        f"{name} does not stop at {' and '.join(ends)}, so answers would run on": bool(ends),
        f"{name} must pad with a token that does not end an answer": pad is None or pad in given,
    }


def check_numbers(plan: Plan, repo: str, folder: Path, adapter: Path | None = None) -> None:
    """Check that the run's metrics give every card line that holds a digit: nobody types a result.

    Lines without digits may be added, and any line may be removed.
    """
    merged = (folder / "config.json").is_file()
    metrics = read_metrics(plan, adapter or plan.folder / "adapter")
    revision = base_revision(plan) if plan.on_hub else ""
    expected = set(card(repo, plan, metrics, merged, revision).splitlines())
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    for count, line in enumerate(lines, start=1):
        if line not in expected and re.search(r"\d", line):
            raise CourseError(
                f"README.md line {count} holds a number that no metric of the run gives "
                f"({line.strip()[:80]}): measure it, or build the folder again."
            )


def snippet_of(folder: Path) -> str:
    """Return the Python code in the folder's card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    if code := re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        return code.group(1)
    raise CourseError(f"the card in {folder.name}/ shows no Python code: build the folder again.")


def run_snippet(folder: Path, repo: str) -> str:
    """Run the card's code unchanged in a fresh Python and return what it prints.

    ``repo`` resolves to ``folder`` there, as if it came from the Hub.
    """
    code = snippet_of(folder)
    with tempfile.TemporaryDirectory() as empty:
        link = Path(empty) / repo
        link.parent.mkdir(parents=True)
        try:
            link.symlink_to(folder.resolve(), target_is_directory=True)
        except OSError:  # on Windows, a link needs a privilege
            shutil.copytree(folder, link)
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=empty, capture_output=True, encoding="utf-8", check=False
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
        raise CourseError(f"the code on the card in {folder.name}/ fails: {reason}")
    return done.stdout.strip()


# ---- the push -----------------------------------------------------------------------------------


def push(folder: Path, repo: str, endpoint: str | None = None) -> str:
    """Send ``folder`` to the Hub as the model ``repo`` and return its address.

    Large files go first, invisible to others. A single commit then shows everything at once, so the
    repository is empty or complete. A broken push resumes: what has arrived is not sent again.

    Raises:
        CourseError: ``check`` fails, no agreement in LICENSE, a bad token, no network, or a
            repository of somebody else. The folder is kept.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError

    check(folder, repo)
    kept = f"{folder.name}/ is kept: repeat the command to resume."
    if (folder / "LICENSE").read_text(encoding="utf-8").startswith(INCOMPLETE):
        raise CourseError(f"LICENSE lacks the agreement: give it with --licence FILE. {kept}")
    if not (token := hub_token()):
        raise CourseError(
            "no Hub token: make a write token under https://huggingface.co/settings/tokens and set "
            f"it as HF_TOKEN. {kept}"
        )
    api = HfApi(endpoint=endpoint, token=token)
    try:
        before, parent = _claim(api, repo)
        names = sorted((p.name for p in folder.iterdir()), key=lambda n: (n == "README.md", n))
        stale = sorted(before - {*names, ".gitattributes"})
        commit = api.create_commit(
            repo,
            [CommitOperationDelete(name) for name in stale]
            + [CommitOperationAdd(name, folder / name) for name in names],
            commit_message="Publish with medquad",
            parent_commit=parent,
        )
    # a RuntimeError where the upload of a large file broke off
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise CourseError(f"{explain(error, repo)} {kept}") from error
    return str(commit.repo_url)


def _claim(api: Any, repo: str) -> tuple[set[str], str | None]:
    """Create the repository, or take an empty one or ours; return its files and last commit."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repo, repo_type="model")
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
    info = api.model_info(repo)
    files = {sibling.rfilename for sibling in info.siblings or []}
    ours = info.card_data is not None and TAG in (info.card_data.get("tags") or [])
    if (others := files - {".gitattributes"}) and not ours:
        raise CourseError(
            f"{repo} exists and holds {min(others)}, which medquad publish did not put there: "
            "choose another name, or delete it."
        )
    return files, info.sha


def explain(error: Exception, repo: str) -> str:
    """Return what went wrong in a push, and what to do, in one line."""
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    cause = cause if isinstance(cause, Exception) else error
    status = getattr(getattr(cause, "response", None), "status_code", 0)
    messages = {
        401: "the Hub does not know the token: make a new one under "
        "https://huggingface.co/settings/tokens and set it as HF_TOKEN.",
        403: f"the token may not write to {repo}: it needs the right to write, and USER must be "
        "you or your organisation.",
        409: f"the name {repo} is taken: choose another one.",
        412: f"{repo} was changed by somebody else in the meantime: look at it, then push again.",
    }
    if status in messages:
        return messages[status]
    if type(cause).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set, so nothing can be sent: unset it."
    first = " ".join(str(cause).split())[:200] or type(cause).__name__
    if status or isinstance(cause, ValueError):
        return f"the Hub refused {repo} ({first})."
    return f"the Hub is out of reach or the connection broke ({first}): check the network."
