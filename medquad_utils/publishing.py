"""From an adapter to a repository on the Hub: the folder, its licence files, a last look for what must not go out, the push."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medquad_utils import CourseError
from medquad_utils.files import whole_folder
from medquad_utils.machine import hub_token
from medquad_utils.model_card import (
    DOI,
    LICENCES,
    TAG,
    Licence,
    attribution,
    card,
    licence_of,
    read_metrics,
)
from medquad_utils.profiles import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Everything that a published folder may hold: no pickle, no optimizer state, no file of another program gets past this list.
FILES = re.compile(
    r"(adapter_|generation_)?config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|"
    r"(tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template\.jinja|README\.md|LICENSE|NOTICE"
)
NEEDED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "LICENSE",
    "NOTICE",
)
INCOMPLETE = "THIS FILE IS A PLACEHOLDER"  # opens a LICENSE that still lacks the agreement
ROUTE = "dequantised"  # of the merged routes the one that drifts least from what was trained


def check_name(repo: str, model_id: str) -> None:
    """Refuse a repository's name that is none, or that the licence of the base does not allow.

    Raises:
        CourseError: names the rule.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        user, name = repo.split("/")
    except (HFValidationError, ValueError) as error:
        raise CourseError(
            f"--repo {repo!r}: expected USER/NAME, of letters, digits, '-', '_' and '.', for example me/my-model."
        ) from error
    licence = licence_of(model_id)
    if licence.agreement and not re.match(r"llama[-_. ]?3", name, re.IGNORECASE):
        raise CourseError(
            f"--repo {repo!r}: {model_id} is under the {licence.name}, which wants the name of a derived model to begin with 'Llama 3'. "
            f"Take for example {user}/llama-3-medquad-qlora."
        )


def build(
    plan: Plan,
    repo: str,
    folder: Path,
    merged: bool = False,
    adapter: Path | None = None,
    licence: Path | None = None,
) -> Path:
    """Write the folder that goes to the Hub, whole or not at all, in place of an older one; returns ``folder``.

    It is the adapter, or with ``merged`` (and always where the base is on no Hub) base and adapter as one model, each with
    tokenizer, chat template, generation config, card, LICENSE and NOTICE. ``licence`` is a copy of the base's agreement.

    Raises:
        CourseError: what ``check_name``, ``generation.check_adapter``, ``merging.merge`` and ``check`` raise; the commit of the
            base is not known; ``folder`` holds something else; the disk is full.
    """
    from medquad_utils.generation import check_adapter, load_tokenizer

    check_name(repo, plan.model_id)
    source = adapter or plan.folder / "adapter"
    check_adapter(plan, source)
    if folder.exists():
        strange = (
            [p.name for p in folder.iterdir() if not FILES.fullmatch(p.name)]
            if folder.is_dir()
            else [folder.name]
        )
        if strange:
            raise CourseError(
                f"{folder.name}/ is in use: it holds {min(strange)}. Choose another folder with --out."
            )
    merged = merged or not plan.on_hub
    revision = base_revision(plan) if plan.on_hub else ""
    text = agreement(plan, revision, licence)
    try:
        with whole_folder(folder) as fresh:
            tokenizer = load_tokenizer(plan)
            _write_model(plan, tokenizer, source, fresh) if merged else _write_adapter(
                plan, tokenizer, source, fresh, revision
            )
            metrics = read_metrics(plan, source)
            (fresh / "README.md").write_text(
                card(repo, plan, metrics, merged, revision), encoding="utf-8"
            )
            (fresh / "LICENSE").write_text(text, encoding="utf-8")
            (fresh / "NOTICE").write_text(
                notice(plan, metrics.plan.get("source", plan.source)), encoding="utf-8"
            )
            check(fresh, repo)
    except OSError as error:
        raise CourseError(
            f"cannot write {folder.name}/: {error.strerror or error}. Nothing was changed; free some space."
        ) from error
    return folder


def base_revision(plan: Plan) -> str:
    """The commit of the base: what the plan pins, or what this machine's cache holds.

    Raises:
        CourseError: neither is there.
    """
    from huggingface_hub import constants

    if plan.revision:
        return plan.revision
    record = (
        Path(constants.HF_HUB_CACHE)
        / f"models--{plan.model_id.replace('/', '--')}"
        / "refs"
        / "main"
    )
    if record.is_file():
        return record.read_text(encoding="utf-8").strip()
    raise CourseError(
        f"which commit of {plan.model_id} the adapter belongs to is not known: load the base once (medquad ask), then publish."
    )


def _write_model(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, adapter: Path, folder: Path
) -> None:
    from medquad_utils import merging

    merging.save(merging.merge(plan, ROUTE, adapter), tokenizer, folder)


def _write_adapter(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, adapter: Path, folder: Path, revision: str
) -> None:
    from transformers import GenerationConfig

    from medquad_utils.chat import end_ids

    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": plan.model_id, "revision": revision}
    (folder / "adapter_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    tokenizer.padding_side = "left"  # as generation wants them
    tokenizer.save_pretrained(folder)
    ends = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    ends.save_pretrained(folder)


# ---- licence files --------------------------------------------------------------------------------------------------


def agreement(plan: Plan, revision: str = "", given: Path | None = None) -> str:
    """The text of LICENSE: the agreement of the base from ``given`` or this machine's cache, else a placeholder that says what is missing.

    Raises:
        CourseError: ``given`` is no such agreement.
    """
    licence = licence_of(plan.model_id)
    if not licence.agreement:
        return _apache()
    for file in [given] if given else _cached_agreements(plan, revision):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CourseError(
                f"cannot read --licence {file.name}: expected the text of the {licence.name}."
            ) from error
        if _is_agreement(text, licence):
            return text
        if given:
            raise CourseError(
                f"--licence {file.name} is not the {licence.name}: expected a text with the title {licence.agreement}."
            )
    return (
        f"{INCOMPLETE}\n\nThis model is derived from {plan.model_id} and is under the {licence.name}.\nThe full agreement stands at "
        f"{licence.url}\nand in the file LICENSE (or LICENSE.txt) of https://huggingface.co/{plan.model_id}\n\nThe licence asks for "
        f"a copy of "
        "the agreement in every copy of the model. Put that file here, in place\nof this one, before you pass this folder on: "
        "medquad publish ... --licence FILE\n"
    )


def _cached_agreements(plan: Plan, revision: str) -> Iterator[Path]:
    """The licence files of the base, where its folder or its snapshot in the cache has them."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("LICENSE", "LICENSE.txt"):
        found = (
            Path(plan.model_path) / name
            if plan.model_path
            else try_to_load_from_cache(plan.model_id, name, revision=revision or None)
        )
        if isinstance(found, str | Path) and Path(found).is_file():
            yield Path(found)


def _is_agreement(text: str, licence: Licence) -> bool:
    return licence.agreement.lower() in " ".join(text.lower().split()) and INCOMPLETE not in text


def _apache() -> str:
    """The Apache License, from the checkout or from what was installed; its address where neither has it."""
    if (file := Path(__file__).parent.parent / "LICENSE").is_file():
        return file.read_text(encoding="utf-8")
    try:
        text = importlib.metadata.distribution("medquad-qlora").read_text("licenses/LICENSE")
    except importlib.metadata.PackageNotFoundError:
        text = None
    return text or f"Licensed under the Apache License, Version 2.0: {LICENCES['apache-2.0'].url}\n"


def notice(plan: Plan, source: str) -> str:
    """The text of NOTICE: the line that the base's licence asks for, the base, and the data."""
    licence = licence_of(plan.model_id)
    base = (
        "the embedded base of the QLoRA course"
        if plan.model_id == "embedded"
        else f"https://huggingface.co/{plan.model_id}"
    )
    lines = [
        *([licence.notice, licence.built] if licence.notice else []),
        f"Derived from {base} ({licence.name}).",
        attribution(source),
    ]
    return "\n\n".join(lines) + "\n"


# ---- the last look --------------------------------------------------------------------------------------------------

SECRETS = {
    "a token of the Hub": re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}"),
    "a token of GitHub": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}"),
    "an access key": re.compile(
        r"\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    ),
}
PATHS = re.compile(
    r"(?<![\w.:/])(/(home|Users|root|tmp|mnt|data|workspace|work|content|kaggle|scratch|private|var/folders)/[\w.@-]+)|\b[A-Za-z]:\\+Users\\+\w+"
)
NO_NAMES = frozenset(
    {"root", "user", "admin", "ubuntu", "jupyter", "runner", "colab", "docker"}
)  # nobody's own


def scan(folder: Path, repo: str) -> None:
    """Refuse a folder that holds what must not go out: strange files, local paths, the user's name, tokens.

    Every text is read, and the header of every weights file. The vocabulary of a tokenizer and the licence are texts of others,
    which may well hold a word like a user's name: there only tokens and this machine's own folders count.

    Raises:
        CourseError: names the file and what it holds; never shows a secret.
    """
    token = hub_token()
    own = {str(p) for p in (Path.home(), Path.cwd(), folder.resolve().parent) if len(p.parts) > 2}
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a container without a user database
        name = ""
    ordinary = Path(__file__).with_name("model_card.py").read_text(encoding="utf-8").lower()
    person = (
        name
        if len(name) > 2 and name.lower() not in NO_NAMES and name.lower() not in ordinary
        else ""
    )
    for file in sorted(folder.rglob("*")):
        where = file.relative_to(folder).as_posix()
        if file.is_symlink() or not file.is_file() or not FILES.fullmatch(where):
            raise CourseError(
                f"{where} does not belong in a published model: remove it from {folder.name}/."
            )
        text = _text(file).replace(repo, "")
        if token and token in text:
            raise CourseError(
                f"{where} holds your Hub token: remove it, and renew the token if the file was ever shared."
            )
        for what, pattern in SECRETS.items():
            if pattern.search(text):
                raise CourseError(
                    f"{where} holds {what}: remove it, and renew it if the file was ever shared."
                )
        if path := next((p for p in own if p in text), ""):
            raise CourseError(f"{where} holds a path of this machine ({path}): remove it.")
        if where in ("tokenizer.json", "LICENSE"):
            continue
        if match := PATHS.search(text):
            raise CourseError(f"{where} holds a local path ({match.group()}): remove it.")
        if person and re.search(rf"(?<!\w){re.escape(person)}(?!\w)", text, re.IGNORECASE):
            raise CourseError(f"{where} holds your user name ({person}): remove it.")


def _text(file: Path) -> str:
    """What a reader finds in a file: all of a text, the header (names, shapes, remarks) of a weights file."""
    if file.suffix != ".safetensors":
        return file.read_text(encoding="utf-8", errors="replace")
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return opened.read(min(size, 100_000_000)).decode("utf-8", "replace")


def check(folder: Path, repo: str) -> None:
    """Refuse a folder that is not whole, breaks its licences or holds what must not go out (``scan``).

    Raises:
        CourseError: names the file and what is wrong with it.
    """
    from huggingface_hub import ModelCard

    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing or not any(folder.glob("*.safetensors")):
        raise CourseError(
            f"{folder.name}/ lacks {missing[0] if missing else 'weights in safetensors'}: build it with medquad publish --dry-run."
        )
    text = (folder / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    licence = LICENCES.get(str(data.get("license")))
    if licence is None or TAG not in (data.get("tags") or []):
        raise CourseError(
            f"README.md is no card of medquad publish (its metadata lack the licence or the tag {TAG}): build it again."
        )
    if DOI not in text or DOI not in (folder / "NOTICE").read_text(encoding="utf-8"):
        raise CourseError(
            f"README.md and NOTICE must attribute MedQuAD (doi {DOI}), whose licence is CC BY 4.0: build the folder again."
        )
    if licence.agreement:
        check_name(repo, str(data.get("base_model") or ""))
        if licence.built not in text or licence.notice not in (folder / "NOTICE").read_text(
            encoding="utf-8"
        ):
            raise CourseError(
                f"README.md must say '{licence.built}' and NOTICE hold Meta's line ({licence.name}): build the folder again."
            )
    if (config := folder / "adapter_config.json").is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        if values.get("base_model_name_or_path") != data.get("base_model") or not values.get(
            "revision"
        ):
            raise CourseError(
                "adapter_config.json must name the Hub id and the revision of its base: build the folder again."
            )
    scan(folder, repo)
    _check_ends(folder)


def _check_ends(folder: Path) -> None:
    """Refuse a generation config with which answers never stop, or that pads with an end token."""
    from transformers import AutoTokenizer, GenerationConfig

    from medquad_utils.chat import end_ids

    tokenizer, config = (
        AutoTokenizer.from_pretrained(folder),
        GenerationConfig.from_pretrained(folder),
    )
    given = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    missing = [tokenizer.convert_ids_to_tokens(i) for i in end_ids(tokenizer) if i not in given]
    if missing:
        raise CourseError(
            f"generation_config.json does not stop at {missing[0]}, so answers would run on: build the folder again."
        )
    if config.pad_token_id is None or config.pad_token_id in given:
        raise CourseError(
            "generation_config.json must pad with a token that ends nothing: build the folder again."
        )


def check_numbers(plan: Plan, repo: str, folder: Path, adapter: Path | None = None) -> None:
    """Refuse a card in which somebody typed a number: every line with a digit has to be one that the run's metrics make.

    Words may be added and lines taken out; the metrics are those of ``plan.folder``, read anew.

    Raises:
        CourseError: names the line; or the commit of the base is not known.
    """
    merged, metrics = (
        (folder / "config.json").is_file(),
        read_metrics(plan, adapter or plan.folder / "adapter"),
    )
    made = set(
        card(repo, plan, metrics, merged, base_revision(plan) if plan.on_hub else "").splitlines()
    )
    for number, line in enumerate(
        (folder / "README.md").read_text(encoding="utf-8").splitlines(), start=1
    ):
        if line not in made and re.search(r"\d", line):
            raise CourseError(
                f"README.md line {number} holds a number that no metric of the run gives ({line.strip()[:80]}): nobody types a result. "
                "Measure it, or build the folder again."
            )


def snippet_of(folder: Path) -> str:
    """The Python code that the folder's card shows.

    Raises:
        CourseError: the card shows none.
    """
    text = (folder / "README.md").read_text(encoding="utf-8")
    if not (code := re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)):
        raise CourseError(
            f"the card in {folder.name}/ shows no Python code: build the folder again."
        )
    return code.group(1)


def run_snippet(folder: Path, repo: str) -> str:
    """Run the card's code to the letter in a fresh Python; returns what it printed.

    It runs in an empty folder in which ``repo`` leads to ``folder``, as if it had come from the Hub.

    Raises:
        CourseError: the code fails; names its last line.
    """
    code = snippet_of(folder)
    with tempfile.TemporaryDirectory() as empty:
        link = Path(empty) / repo
        link.parent.mkdir(parents=True)
        try:
            link.symlink_to(folder.resolve(), target_is_directory=True)
        except OSError:  # Windows asks for a privilege that few have
            shutil.copytree(folder, link)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=empty,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
    if done.returncode:
        raise CourseError(
            f"the snippet of the card in {folder.name}/ fails: {(done.stderr.strip().splitlines() or ['no word'])[-1][:200]}"
        )
    return done.stdout.strip()


# ---- the push -------------------------------------------------------------------------------------------------------


def push(folder: Path, repo: str, endpoint: str | None = None) -> str:
    """Send ``folder`` to the Hub as the model ``repo``; returns its address.

    Large files go first, one by one, where nobody sees them; then a single commit makes all of them and, last, the card visible. So
    the repository is empty or whole at any time. A push that broke off goes on where it was: what has arrived is not sent again.

    Raises:
        CourseError: what ``check`` raises; the agreement is missing from LICENSE; no token or a wrong one; no network; a
            repository of that name that is not of this course. The folder is kept.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError

    check(folder, repo)
    if (folder / "LICENSE").read_text(encoding="utf-8").startswith(INCOMPLETE):
        raise CourseError(
            "LICENSE lacks the agreement, and the licence asks for a copy: give it with --licence FILE. The folder is kept."
        )
    token = hub_token()
    if not token:
        raise CourseError(
            f"no Hub token: make one with the right to write under https://huggingface.co/settings/tokens and set it as HF_TOKEN. "
            f"{_kept(folder)}"
        )
    api = HfApi(endpoint=endpoint, token=token)
    try:
        before, parent = _claim(api, repo)
        names = sorted(
            (p.name for p in folder.iterdir()), key=lambda name: (name == "README.md", name)
        )
        stale = [
            CommitOperationDelete(name) for name in sorted(before - {*names, ".gitattributes"})
        ]
        commit = api.create_commit(
            repo,
            [*stale, *(CommitOperationAdd(name, folder / name) for name in names)],
            commit_message="Publish with medquad",
            parent_commit=parent,
        )
    except (
        HTTPError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a RuntimeError where the upload of a large file broke off
        raise CourseError(f"{explain(error, repo)} {_kept(folder)}") from error
    return str(commit.repo_url)


def _kept(folder: Path) -> str:
    return f"{folder.name}/ is kept: the same command goes on from there."


def _claim(api: Any, repo: str) -> tuple[set[str], str | None]:
    """Make the repository, or take one of ours or an empty one; returns the files in it and its last commit.

    Raises:
        CourseError: it holds something that this course did not publish.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repo, repo_type="model")
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
    info = api.model_info(repo)
    files = {sibling.rfilename for sibling in info.siblings or []}
    ours = info.card_data is not None and TAG in (info.card_data.get("tags") or [])
    if files - {".gitattributes"} and not ours:
        raise CourseError(
            f"{repo} exists and holds {min(files - {'.gitattributes'})}, which medquad publish did not put there: choose another "
            f"name, or delete it."
        )
    return files, info.sha


def explain(error: Exception, repo: str) -> str:
    """What went wrong in a push, and what to do, in one line."""
    cause = (
        error.__cause__
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
        else error
    )
    response = getattr(cause, "response", None)
    status = getattr(response, "status_code", 0)
    known = {
        401: "the Hub does not know the token: make a new one under https://huggingface.co/settings/tokens and set it as HF_TOKEN.",
        403: f"the token may not write to {repo}: it needs the right to write, and USER must be you or an organisation of yours.",
        409: f"the name {repo} is taken: choose another one.",
        412: f"{repo} was changed by somebody else in the meantime: look at it, then push again.",
    }
    if status in known:
        return known[status]
    if type(cause).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set, so that nothing can be sent: unset it."
    first = " ".join(str(cause).split())[:200] or type(cause).__name__
    if status or isinstance(cause, ValueError):
        return f"the Hub refused {repo} ({first})."
    return f"the Hub is out of reach or the connection broke ({first}): check the network."
