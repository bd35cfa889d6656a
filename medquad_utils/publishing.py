"""Publish an adapter on the Hub: folder, model card, licences, a check for secrets, the push."""

from __future__ import annotations

import getpass
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from safetensors import SafetensorError

from medquad_utils import CourseError, merging
from medquad_utils.adapters import adapter_id, check_adapter, save_with
from medquad_utils.atomic import reason, whole_folder
from medquad_utils.chat import NOTICE, SYSTEM_PROMPT, THREE_QUESTIONS, end_ids
from medquad_utils.data import HUB_DATASET
from medquad_utils.files import ASSETS, read_json, write_json
from medquad_utils.generation import load_tokenizer
from medquad_utils.machine import free_memory, hub_token
from medquad_utils.profiles import BASES, Plan
from medquad_utils.report import NOT_MEASURED, escaped, number, sentence, why_missing
from medquad_utils.scores import SCORES
from medquad_utils.splits import BOILERPLATE

# The only names in a published folder: no pickle, no optimizer state, no file of another program.
FILES = re.compile(
    r"(adapter_|generation_)?config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors"
    r"(\.index\.json)?|(tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template\.jinja"
    r"|README\.md|LICENSE|NOTICE"
)
NEEDED = "generation_config.json tokenizer.json tokenizer_config.json README.md LICENSE NOTICE"
LICENCE_FILES = ("LICENSE", "LICENSE.txt")  # in the folder of a base
INCOMPLETE = "THIS FILE IS A PLACEHOLDER"  # the first words of a LICENSE without the agreement
TAG = "medquad-qlora"  # in every card: a later push recognises the repository by it
OF_META = r"(meta[-_.]?)?llama"  # how the name of a Llama begins
COURSE = "https://github.com/medquad-qlora/medquad-qlora"
DOI = "10.1186/s12859-019-3119-4"
PAPER = (
    "Asma Ben Abacha and Dina Demner-Fushman, A Question-Entailment Approach to Question "
    f"Answering, BMC Bioinformatics 2019, 20:511, https://doi.org/{DOI}"
)
OWN_ROWS = ("csv", "jsonl", "parquet")  # sources that may hold anything
OWN_LINE = "Trained on rows of the publisher's own."
COLUMNS = ("base", "tuned", "nearest", "another disease")
# Score -> the Hub's name of the metric. The card's metadata hold these, and the safety prompts.
HUB_METRICS = {"facts_complete": "accuracy", "rougeL": "rouge", "rouge1": "rouge",
               "rouge2": "rouge", "bleu": "bleu", "chrf": "chrf"}  # fmt: skip


# ---- licences -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Licence:
    """What the licence of a base requires of a model derived from it (``licences.toml``)."""

    id: str  # in the Hub's list of licences
    name: str
    url: str = ""
    title: str = ""  # of its text, in capitals
    agreement: bool = False  # a copy of the text must go along, with the words below
    notice: str = ""  # required text of NOTICE
    built: str = ""  # required words in the card
    begins: str = ""  # required beginning of the model's name
    policy: str = ""  # address of the acceptable use policy

    @property
    def prefix(self) -> str:
        """Return ``begins`` as the beginning of a repository name: "llama-3-", or ""."""
        return "-".join([*self.begins.lower().split(), ""])


LICENCES = {
    id: Licence(id, **fields)
    for id, fields in tomllib.loads((ASSETS / "licences.toml").read_text(encoding="utf-8")).items()
}


def licence_of(base: Plan | str, *texts: Path) -> Licence:
    """Return the licence that a model derived from ``base``, a plan or a Hub id, inherits.

    The course knows those of its own bases and of Llama 3. For others, a copy of the licence says
    it: a file of ``texts``, or LICENSE in the base's folder. Without one it is "unknown".
    """
    model_id = base if isinstance(base, str) else "" if base.model_path else base.model_id
    if model_id in BASES:
        return LICENCES[BASES[model_id].licence]
    if llama := re.search(r"/.*llama-?3(\.\d)?(?![\db])", model_id.lower()):
        return LICENCES.get(f"llama3{llama[1] or ''}", LICENCES["unknown"])
    folder = Path(getattr(base, "model_path", "") or "nowhere")
    titled = [licence for licence in LICENCES.values() if licence.title]
    copies = [*texts, *(folder / name for name in LICENCE_FILES)]
    stated = (licence for file in copies for licence in titled if _text_of(licence, file))
    return next(stated, LICENCES["unknown"])


def _text_of(licence: Licence, file: Path) -> str:
    """Return the text of a licence file if it begins with the licence's title, else ""."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return text if licence.title in " ".join(text.upper().split())[:2000] else ""


def check_name(repo: str, base: Plan | str, licence: Licence | None = None) -> None:
    """Check the repository name: valid on the Hub, and allowed by the base model's licence."""
    from huggingface_hub.utils import validate_repo_id

    model_id = base if isinstance(base, str) else base.model_id
    licence = licence or licence_of(base)
    try:
        validate_repo_id(repo)
        user, name = repo.split("/")
    except ValueError as error:
        raise CourseError(
            f"--repo {repo!r}: expected USER/NAME, of letters, digits, '-', '_' and '.', "
            "for example me/my-model."
        ) from error
    problem = ""
    if not re.match(licence.begins.replace(" ", "[-_.]?"), name, re.IGNORECASE):
        problem = f"{model_id} is under the {licence.name}, so the name of a derived model must "
        problem += f"begin with {licence.begins!r}"
    elif not (licence.begins or "llama" in model_id.lower()) and re.match(OF_META, name, re.I):
        problem = f"the base {model_id!r} is not a Llama of Meta, so the name must not say so"
    if problem:
        example = f"{user}/{licence.prefix}medquad-qlora"
        raise CourseError(f"--repo {repo!r}: {problem}. Take for example {example}.")


def agreement(plan: Plan, licence: Licence, given: Path | None = None) -> str:
    """Return the text of LICENSE: the base's licence, from ``given`` or the folder of the base.

    Where this machine does not have an agreement, a placeholder says how to add it.
    """
    if licence.id == "apache-2.0" and not given:
        text = importlib.metadata.distribution("medquad-qlora").read_text("licenses/LICENSE")
        return text or f"{licence.name}: {licence.url}\n"
    beside = [Path(plan.model_source, name) for name in LICENCE_FILES]
    for file in [given] if given else beside:
        if text := _text_of(licence, file):
            return text
    if given:
        title = f"a text with the title {licence.title}" if licence.title else "the text of it"
        raise CourseError(
            f"--licence {given.name} is not the {licence.name}: expected {title}, or no --licence."
        )
    return (
        f"{INCOMPLETE}\n\nThis model is derived from {plan.model_id}, under the {licence.name}:\n"
        f"{licence.url}\n\nEvery copy needs its text: medquad publish ... --licence FILE\n"
    )


# ---- the card and NOTICE ------------------------------------------------------------------------


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
    train, data = (_json(plan.folder / "metrics" / f"{n}.json") for n in ("train", "explore"))
    evaluation = _json(plan.folder / "evaluation" / "metrics.json", recipe=dict)
    parts = {"training": train, "data": data, "evaluation": evaluation}
    notes = [f"no metrics of the {name}" for name, values in parts.items() if not values]
    trained, earlier = _json(adapter / "plan.json"), train.get("plan", {})
    folders = {"model_path", "data_path", "out"}  # may be written in two ways
    if any(trained[key] != earlier[key] for key in (earlier.keys() & trained.keys()) - folders):
        train = {}
        notes.append("metrics/train.json is of another training")
    if evaluation and evaluation.get("recipe", {}).get("adapter") != adapter_id(adapter):
        evaluation = {}
        notes.append("evaluation/metrics.json is of another adapter")
    made = _json(plan.folder / "data" / "data.json")
    counted = tuple(map(made.get, ("loaded", "rows", "cleaning", "splits")))
    told = (*map(data.get, ("rows_loaded", "sizes", "cleaning")), trained.get("data"))
    if data and told != counted:
        data = {}
        notes.append("metrics/explore.json is not of the rows that the adapter was trained on")
    return Metrics(trained or earlier, train, data, evaluation, tuple(notes))


def _json(path: Path, **kinds: type) -> Any:
    return read_json(path, **kinds) if path.is_file() else {}


def card(
    repo: str, plan: Plan, metrics: Metrics, merged: bool, revision: str,
    licence: Licence | None = None,
) -> str:  # fmt: skip
    """Return the README.md of ``repo``, with metadata.

    ``merged``: a whole model, else an adapter of ``plan.model_id`` at commit ``revision``.
    """
    tuned = metrics.evaluation.get("overall", {}).get("arms", {}).get("tuned", {})
    return _render(
        "card.md.jinja", plan, str(metrics.plan.get("source", plan.source)), licence, repo=repo,
        merged=merged, revision=revision, trained=metrics.plan, train=metrics.train,
        data=metrics.data, evaluation=metrics.evaluation, columns=COLUMNS, scores=SCORES,
        hub_metrics={
            score: metric for score, metric in HUB_METRICS.items()
            if score in tuned and tuned[score]["mean"] is not None
        },
        tag=TAG, dataset=HUB_DATASET, notice=NOTICE, system_prompt=SYSTEM_PROMPT,
        question=THREE_QUESTIONS[0], sentence=sentence, why_missing=why_missing,
        most_foci=BOILERPLATE,
    )  # fmt: skip


def notice(plan: Plan, source: str, licence: Licence | None = None) -> str:
    """Return the text of NOTICE: the line of the base's licence, the base, and the data."""
    return _render("notice.jinja", plan, source, licence)


def _render(
    template: str, plan: Plan, source: str, licence: Licence | None, **values: Any
) -> str:  # fmt: skip
    """Fill in a template: numbers are formatted, and what is missing reads "not measured"."""

    def shown(value: Any) -> Any:
        if value is None or isinstance(value, jinja2.Undefined):
            return NOT_MEASURED
        return number(value) if isinstance(value, int | float) else value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), undefined=jinja2.ChainableUndefined, finalize=shown,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["escaped"] = lambda text: escaped(text) if isinstance(text, str) else text
    return environment.get_template(template).render(
        values, plan=plan, source=source, licence=licence or licence_of(plan),
        embedded=plan.model_id == "embedded", local=bool(plan.model_path),
        course=COURSE, paper=PAPER, doi=DOI, own_rows=OWN_ROWS, own_line=OWN_LINE,
    )  # fmt: skip


# ---- the folder ---------------------------------------------------------------------------------


def build(
    plan: Plan, repo: str, folder: Path, merged: bool = False, adapter: Path | None = None,
    licence: Path | None = None,
) -> Path:  # fmt: skip
    """Write the folder for the Hub, whole or not at all, replacing an older one.

    It holds the adapter, or base and adapter merged (``merged``, and always where the base is not
    on the Hub), with tokenizer, generation config, card, LICENSE (of ``licence``) and NOTICE.
    """
    terms = licence_of(plan, *filter(None, [licence]))
    check_name(repo, plan, terms)
    source = adapter or plan.folder / "adapter"
    check_adapter(plan, source)
    if others := [p.name for p in folder.glob("*") if not FILES.fullmatch(p.name)]:
        text = f"{folder.name}/ is in use: it holds {min(others)}. Choose another folder."
        raise CourseError(text)
    merged = merged or not plan.on_hub
    metrics = read_metrics(plan, source)
    texts = {
        "README.md": card(repo, plan, metrics, merged, plan.hub_revision or "", terms),
        "NOTICE": notice(plan, metrics.plan.get("source", plan.source), terms),
        "LICENSE": agreement(plan, terms, licence),
    }
    try:
        with whole_folder(folder) as fresh:
            if merged:
                model = merging.merge(plan, "dequantised", source)  # the route that drifts least
                merging.save(model, load_tokenizer(plan), fresh)
            else:
                _copy_adapter(plan, source, fresh)
            for name, text in texts.items():
                (fresh / name).write_text(text, encoding="utf-8")
                (fresh / name).chmod(0o644)  # whatever the umask
            check(fresh, repo)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise CourseError(
            f"cannot write {folder.name}/: {reason(error)} Nothing was changed."
        ) from error
    return folder


def _copy_adapter(plan: Plan, adapter: Path, folder: Path) -> None:
    folder.mkdir()
    config = read_json(adapter / "adapter_config.json")  # may name a folder of this machine
    config |= {"base_model_name_or_path": plan.model_id, "revision": plan.hub_revision}
    write_json(folder / "adapter_config.json", config)
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    save_with(load_tokenizer(plan), folder)


# ---- the check before the push ------------------------------------------------------------------

SECRETS = {
    "a token of the Hub": r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}",
    "an access key": r"\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{30,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
PATHS = (
    r"(?<![\w.:/])(/(home|Users|root|tmp|mnt|data|workspace|work|content|kaggle|scratch|private|"
    r"var/folders)/[\w.@-]+)|\b[A-Za-z]:\\+Users\\+\w+"
)
# User names that are common words, or shared by many machines: in a text they identify nobody.
COMMON = {"root", "user", "admin", "ubuntu", "jupyter", "runner", "model", "data", "will", "may",
          "test", "research", "python", "base", "health", "default", "course"}  # fmt: skip


def scan(folder: Path, repo: str) -> dict[str, str]:
    """Check every file for a strange name, tokens, local paths and the user; return name -> text.

    Of weights it reads the header: names, shapes, remarks. No message shows a secret. A tokenizer's
    vocabulary and the licence may hold any word: there, only tokens and own folders count.
    """
    secrets, texts = dict(SECRETS), {}
    if token := hub_token():
        secrets["your Hub token"] = re.escape(token)
    own, words = _personal(folder, repo)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink() or not file.is_file() or not FILES.fullmatch(name):
            text = f"{name} does not belong in a published model: remove it from {folder.name}/."
            raise CourseError(text)
        with file.open("rb") as opened:
            weights = file.suffix == ".safetensors"  # begins with the length of its header
            size = min(int.from_bytes(opened.read(8), "little"), 100_000_000) if weights else -1
            text = texts[name] = opened.read(size).decode("utf-8", "replace")
        for what, pattern in secrets.items():
            if re.search(pattern, text):
                raise CourseError(f"{name} holds {what}: remove it, and renew it on its site.")
        patterns = own if name in ("tokenizer.json", "LICENSE") else own | words
        for what, pattern in patterns.items():
            if match := re.search(pattern, text):
                raise CourseError(f"{name} holds {what} ({match.group()}): remove it.")
    return texts


def _personal(folder: Path, repo: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return patterns of this machine's own folders, and of words that may tell who works here."""
    own, words = {}, {"a local path": PATHS}
    folders = (Path.home(), Path.cwd(), folder.resolve().parent)
    if paths := [re.escape(str(path)) for path in folders if len(path.parts) > 2]:
        own["a path of this machine"] = "|".join(paths)
    with suppress(OSError, KeyError):  # a container without a user database
        user = getpass.getuser()
        named = rf"(?i)(?<!\w){re.escape(user)}(?!\w)"
        public = re.search(named, repo)
        if len(user) > 2 and user.lower() not in COMMON and not public:
            words["your user name"] = named
    return own, words


def check(folder: Path, repo: str) -> None:
    """Check that a folder is complete, keeps its licences, and holds no secret (``scan``)."""
    from huggingface_hub import ModelCard

    texts = scan(folder, repo)
    missing = [name for name in NEEDED.split() if name not in texts]
    if missing or not any(name.endswith(".safetensors") for name in texts):
        raise CourseError(
            f"{folder.name}/ lacks {missing[0] if missing else 'weights in safetensors'}: "
            "build it with medquad publish --dry-run."
        )
    text, credits = texts["README.md"], texts["NOTICE"]
    try:
        data = ModelCard(text).data
    except Exception as error:  # of YAML: somebody wrote into its header
        raise CourseError(f"README.md has no readable header ({error}): build again.") from error
    config = _json(folder / "adapter_config.json")
    base, named = data.get("base_model"), config.get("base_model_name_or_path")
    licence = LICENCES.get(str(data.get("license")))
    if licence is None or TAG not in (data.get("tags") or []):
        raise CourseError("README.md is no card of medquad publish: build the folder again.")
    if licence.agreement:
        check_name(repo, str(base or "the base"), licence)
    problems = {
        f"README.md and NOTICE must attribute MedQuAD (doi {DOI}, CC BY 4.0)":
            not all(DOI in said or OWN_LINE in said for said in (text, credits)),
        f"README.md must say '{licence.built}' and NOTICE hold Meta's line ({licence.name})":
            licence.built not in text or licence.notice not in credits,
        "adapter_config.json must name the Hub id and the revision of its base":
            bool(config) and (named != base or not config.get("revision")),
        **_generation_problems(folder),
        **_reader_problems(folder),
    }  # fmt: skip
    for problem, present in problems.items():
        if present:
            raise CourseError(f"{problem}: build the folder again.")


def _generation_problems(folder: Path) -> dict[str, bool]:
    """Return whether answers run past an end token, are padded with one, or are drawn at random."""
    from transformers import AutoTokenizer

    name = "generation_config.json"
    config = read_json(folder / name, eos_token_id=list)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given, pad = config.get("eos_token_id", []), config.get("pad_token_id")
    ends = [tokenizer.convert_ids_to_tokens(i) for i in end_ids(tokenizer) if i not in given]
    return {
        f"{name} does not stop at {' and '.join(ends)}, so answers would run on": bool(ends),
        f"{name} must pad with a token that does not end an answer": pad is None or pad in given,
        f"{name} must be greedy: so were the answers that the card scores":
            config.get("do_sample") is not False or "temperature" in config,
    }  # fmt: skip


def _reader_problems(folder: Path) -> dict[str, bool]:
    """Return whether transformers before 5, vLLM or Ollama would read another model; raw JSON."""
    config, tokenizer = (_json(folder / n) for n in ("config.json", "tokenizer_config.json"))
    rope = config.get("rope_parameters") or {}
    scaled = rope.get("rope_type", "default") != "default"
    closed = [p.name for p in folder.iterdir() if p.stat().st_mode & 0o444 != 0o444]
    return {
        "config.json must repeat rope_theta and rope_scaling where older programs look for them":
            rope.get("rope_theta") != config.get("rope_theta")
            or scaled != bool(config.get("rope_scaling")),
        "tokenizer_config.json must name PreTrainedTokenizerFast and additional_special_tokens":
            tokenizer.get("tokenizer_class") != "PreTrainedTokenizerFast"
            or "extra_special_tokens" in tokenizer,
        f"{min(closed, default='')} cannot be read by other accounts": bool(closed),
    }  # fmt: skip


def check_numbers(plan: Plan, repo: str, folder: Path) -> None:
    """Check that the run's metrics give every card line that holds a digit: nobody types a result.

    Lines without digits may be added, and any line may be removed.
    """
    merged, licence = (folder / "config.json").is_file(), licence_of(plan, folder / "LICENSE")
    metrics = read_metrics(plan, plan.folder / "adapter")
    expected = card(repo, plan, metrics, merged, plan.hub_revision or "", licence).splitlines()
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
    if code := re.search(r"(?ms)^```python\n(.*?)^```", text):
        return code.group(1)
    raise CourseError(f"the card in {folder.name}/ shows no Python code: build the folder again.")


def run_snippet(folder: Path, repo: str) -> str:
    """Run the card's code unchanged in a fresh Python and return what it prints.

    ``repo`` resolves to ``folder`` there, as if it came from the Hub.
    """
    command = [sys.executable, "-c", snippet_of(folder)]
    free_memory()  # the code loads the model in a process of its own
    with tempfile.TemporaryDirectory() as empty:
        link = Path(empty) / repo
        link.parent.mkdir(parents=True)
        try:
            link.symlink_to(folder.resolve(), target_is_directory=True)
        except OSError:  # on Windows, a link needs a privilege
            shutil.copytree(folder, link)
        done = subprocess.run(command, cwd=empty, capture_output=True, encoding="utf-8")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
        raise CourseError(f"the code on the card in {folder.name}/ fails: {reason}")
    return done.stdout.strip()


# ---- the push -----------------------------------------------------------------------------------

TOKENS = "under https://huggingface.co/settings/tokens and set it as HF_TOKEN"


def push(folder: Path, repo: str, endpoint: str | None = None) -> str:
    """Send ``folder`` to the Hub as the model ``repo`` and return its address.

    One commit shows everything at once, so the repository is empty or complete. A broken push
    resumes: large files that have arrived, invisible to others, are not sent again. What somebody
    else commits in the meantime is not overwritten. Whatever stands against the push is a
    CourseError, and the folder is kept.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError

    check(folder, repo)
    kept = f"{folder.name}/ is kept: repeat the command. What has arrived is not sent again."
    if (folder / "LICENSE").read_text(encoding="utf-8").startswith(INCOMPLETE):
        raise CourseError(f"LICENSE lacks the agreement: give it with --licence FILE. {kept}")
    if not (token := hub_token()):
        raise CourseError(f"no Hub token: make a write token {TOKENS}. {kept}")
    api = HfApi(endpoint=endpoint, token=token)
    names = {path.name for path in folder.iterdir()}
    try:
        before, parent = _claim(api, repo)
        changes: list[Any] = [CommitOperationDelete(name) for name in sorted(before - names)]
        changes += [CommitOperationAdd(name, folder / name) for name in sorted(names)]
        # Not upload_folder: it may spread a large folder over several commits.
        message = "Publish with medquad"
        commit = api.create_commit(repo, changes, commit_message=message, parent_commit=parent)
    # a RuntimeError where the upload of a large file broke off
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise CourseError(f"{push_problem(error, repo)} {kept}") from error
    return str(commit.repo_url)


def _claim(api: Any, repo: str) -> tuple[set[str], str | None]:
    """Create the repository, or take an empty one or ours; return its files and last commit."""
    api.create_repo(repo, repo_type="model", exist_ok=True)
    info = api.model_info(repo)
    files = {file.rfilename for file in info.siblings or []} - {".gitattributes"}
    if files and TAG not in ((info.card_data or {}).get("tags") or []):
        raise CourseError(
            f"{repo} exists and holds {min(files)}, which medquad publish did not put there: "
            "choose another name, or delete it."
        )
    return files, info.sha


def push_problem(error: Exception, repo: str) -> str:
    """Return what went wrong in a push, and what to do, in one line."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", 0)
    if status == 401:
        return f"the Hub does not know the token: make a new one {TOKENS}."
    if status == 403:
        who = "it needs the right to write, and USER must be you or your organisation"
        return f"the token may not write to {repo}: {who}."
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be sent: unset it."
    told = getattr(cause, "server_message", None) or str(cause)  # the Hub's own words first
    first = " ".join(told.split())[:200] or type(cause).__name__
    if status or isinstance(cause, ValueError):
        return f"the Hub refused {repo} ({first})."
    return f"the Hub is out of reach or the connection broke ({first}): check the network."
