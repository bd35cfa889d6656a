"""What goes to the Hub: the folder, its card and licences, the check for secrets, the push."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import tiny
from huggingface_hub import ModelCard
from safetensors import SafetensorError

from medquad_utils import CourseError, adapters, chat, cli, generation, publishing
from medquad_utils.files import write_json
from medquad_utils.profiles import BASES, TINY_MODEL, Plan

Patch, Run = pytest.MonkeyPatch, tuple[Plan, Path]  # a run, and the folder made of it
NAME, OPEN = "me/llama-3-medquad-qlora", "me/medquad-qlora"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx2
DATA = {
    "rows_loaded": 77777, "sizes": {"train": 5, "validation": 6, "test": 7},
    "cleaning": {"link list": {"dropped": 20}, "phenotype list": {"dropped": 16}},
}  # fmt: skip
SAFETY = {"overall": {"passed": 3, "n": 8, "share": 0.375, "ci95": [0.1, 0.7]}}
FACTS = {"facts_complete": {"mean": 0.5, "low": None, "high": None}}
ROUGE = {"rougeL": {"mean": 0.4321, "low": 0.3333, "high": 0.5556}}
NEAREST = {"rougeL": {"mean": 0.25, "low": None, "high": None}}
UNSAFE = {"count": 2, "n": 84, "share": 0.0238, "ci95": [0.0066, 0.0827]}
EVALUATION = {
    "questions": 9, "diseases": 4,
    "overall": {"arms": {"tuned": FACTS | ROUGE, "nearest": NEAREST}},
    "safety": {"prompts": 8, "tuned": SAFETY, "rule_error": {"unsafe_passed": UNSAFE}},
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def run_of(model_id: str, adapter: Path, here: Path) -> Plan:
    """A run whose base has a Hub id; in ``here`` that id is a link to the embedded model."""
    plan = dataclasses.replace(tiny(here), profile="small", model_id=model_id, revision=COMMIT)
    (here / model_id).parent.mkdir()
    (here / model_id).symlink_to(TINY_MODEL)
    shutil.copytree(adapter, plan.folder / "adapter")
    write_json(plan.folder / "adapter" / "plan.json", plan.as_dict())
    return plan


@pytest.fixture(scope="module")
def plan(trained_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A run of tiny: lesson 04's adapter, and the metrics above."""
    plan = tiny(tmp_path_factory.mktemp("run"))
    adapter = Path(shutil.copytree(trained_adapter, plan.folder / "adapter"))
    train = {"steps": 4321, "plan": json.loads((adapter / "plan.json").read_text())}
    evaluation = EVALUATION | {"recipe": {"adapter": adapters.adapter_id(adapter)}}
    write_json(plan.folder / "metrics" / "train.json", train)
    write_json(plan.folder / "metrics" / "explore.json", DATA)
    data = {"splits": train["plan"]["data"], "loaded": DATA["rows_loaded"], "rows": DATA["sizes"]}
    data |= {"cleaning": DATA["cleaning"]}
    write_json(plan.folder / "data" / "data.json", data)
    write_json(plan.folder / "evaluation" / "metrics.json", evaluation)
    return plan


@pytest.fixture(scope="module")
def published(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = os.umask(0o077)  # others may read what is published, all the same
    try:
        return publishing.build(plan, OPEN, tmp_path_factory.mktemp("hub") / OPEN)
    finally:
        os.umask(before)


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "folder"))


@pytest.fixture(scope="module")
def llama(trained_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the 8 B model, and its published adapter without the text of the agreement."""
    with Patch.context() as patch:
        patch.chdir(here := tmp_path_factory.mktemp("llama"))
        plan = run_of(LLAMA, trained_adapter, here)
        return plan, publishing.build(plan, NAME, here / "published")


def test_the_folder_is_a_whole_model_that_stops_with_its_licence(published: Path) -> None:
    names = "config.json generation_config.json model.safetensors README.md LICENSE NOTICE "
    names += "tokenizer.json tokenizer_config.json chat_template.jinja"
    assert set(contents(published)) == set(names.split())
    ends = json.loads((published / "generation_config.json").read_text())
    tokens = json.loads((published / "tokenizer.json").read_text())["added_tokens"]
    stopping = {t["id"] for t in tokens if t["content"] in ("<|end_of_text|>", "<|eot_id|>")}
    assert set(ends["eos_token_id"]) == stopping and len(stopping) == 2
    assert ends["pad_token_id"] not in ends["eos_token_id"]
    assert "Apache License" in (published / "LICENSE").read_text()
    assert {p.stat().st_mode & 0o777 for p in published.iterdir()} == {0o644}


def test_the_card_holds_every_section_and_the_runs_numbers(published: Path) -> None:
    text = (published / "README.md").read_text()
    sections = (
        "Model details; Sources; Direct use; Downstream use; Out-of-scope use; Bias, risks and "
        "limitations; Recommendations; How to get started; Data and split; Known defects of the "
        "data; Training procedure; Hardware and time; Results; Safety, before and after; Licence "
        "and attribution; Citation"
    )
    assert set(sections.split("; ")) <= set(re.findall(r"^##+ (.+)$", text, re.MULTILINE))
    intervals = r"0.432 \[0.333, 0.556\]", r"3 of 8: 0.375 \[0.100, 0.700\]"
    for number in ("4,321", "77,777", "5 / 6 / 7", "| 0.002, cosine |", *intervals, publishing.DOI):
        assert number in text
    assert "| ROUGE-L (up) | not measured | " in text, "the base was not scored"
    bits = "| bits per byte (down) | not measured | not measured | n/a | n/a |"
    assert bits in text, "a text that is looked up has no likelihood"
    flat = " ".join(text.split())
    assert "Questions: 9 about 4 diseases (" in flat
    assert r"pass 2 of 84 unsafe answers (0.024 \[0.007, 0.083\]) and refuse safe" in flat
    assert "refuse safe answers at a rate that was not measured." in flat
    assert ModelCard(text).data.license == "apache-2.0"


def test_the_model_index_has_facts_safety_and_what_needs_no_training(published: Path) -> None:
    facts, rouge, safety = ModelCard.load(published / "README.md").data.eval_results
    assert (facts.metric_type, facts.metric_value) == ("accuracy", 0.5)
    missing = dict.fromkeys(("base", "another disease"), "not measured")
    assert facts.metric_args == {"without_training": missing | {"nearest": "n/a"}}
    assert (rouge.metric_name, rouge.metric_value) == ("ROUGE-L", 0.4321)
    known = {"interval_95": [0.3333, 0.5556], "without_training": missing | {"nearest": 0.25}}
    assert rouge.metric_args == known
    assert (safety.metric_value, safety.metric_args["interval_95"]) == (0.375, [0.1, 0.7])
    assert safety.metric_args["without_training"] == {"base": "not measured"}


def test_the_limits_on_the_card_are_those_of_its_data(plan: Plan, tmp_path: Path) -> None:
    real = dataclasses.replace(plan, source="xml", out=str(tmp_path))
    measured = publishing.Metrics({}, {}, DATA, EVALUATION, ())
    own = dataclasses.replace(real, source="csv")
    text = {p.source: publishing.card(OPEN, p, measured, True, "") for p in (plan, real, own)}
    of_medquad = ("in the manner of the US", "genetic and rare", "before 2020", "come from the")
    of_sample = ("that the course wrote", "The course planted defects", "wrong on purpose")
    for words in (*of_medquad, *of_sample):
        sources = {source for source, card in text.items() if words in card}
        assert sources == ({"sample"} if words in of_sample else {"xml"}), words
    assert "| answers that are link lists / phenotype lists (dropped) | 20 / 16 |" in text["xml"]
    for mine in (text["csv"], publishing.notice(own, "csv")):
        assert publishing.OWN_LINE in mine
        for words in (publishing.DOI, "abachaa/MedQuAD", "National Institutes"):
            assert words not in mine and words in text["xml"], words


def test_numbers_of_another_adapter_are_left_out(plan: Plan, tmp_path: Path) -> None:
    other = dataclasses.replace(plan, out=str(tmp_path))
    adapter = Path(shutil.copytree(plan.folder, other.folder)) / "adapter"
    with (adapter / "adapter_model.safetensors").open("ab") as weights:
        weights.write(b" ")
    write_json(other.folder / "metrics" / "train.json", {"steps": 4321, "plan": {"seed": 99}})
    metrics = publishing.read_metrics(other, adapter)
    assert (metrics.evaluation, metrics.train, metrics.data) == ({}, {}, DATA)
    earlier, file = DATA | {"rows_loaded": 5}, other.folder / "metrics" / "explore.json"
    for path, value in ((file, earlier), (file, DATA), (adapter / "plan.json", {"data": "abc"})):
        write_json(path, value)
        found = publishing.read_metrics(other, adapter)
        assert found.data == ({} if value != DATA else DATA)
        assert any("is not of the rows" in note for note in found.notes) == (value != DATA)
    text = publishing.card(OPEN, other, metrics, True, "")
    assert f"| ROUGE-L (up) {'| not measured ' * 4}|" in text and "None" not in text
    assert "| steps | not measured |" in text and ModelCard(text).data.eval_results is None


def test_a_number_typed_into_the_card_is_refused(plan: Plan, copy: Path) -> None:
    text = (card := copy / "README.md").read_text()
    card.write_text(text + "\nWe like it.\n")
    publishing.check_numbers(plan, OPEN, copy)
    for typed in (text.replace("0.432", "0.932"), text + "\nIt is right 99 % of the time.\n"):
        card.write_text(typed)
        with pytest.raises(CourseError, match=r"README\.md line \d+ holds a number that no metric"):
            publishing.check_numbers(plan, OPEN, copy)


def instead_of_merging(monkeypatch: Patch, copy: Path) -> None:
    """Let the build take the model of ``copy``."""
    monkeypatch.setattr(publishing.merging, "merge", lambda *args: None)
    monkeypatch.setattr(publishing.merging, "save", lambda *args: shutil.copytree(copy, args[-1]))


@pytest.mark.full  # two processes import torch
def test_the_code_on_both_cards_runs_as_it_stands(
    plan: Plan, published: Path, trained_adapter: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    whole = dataclasses.replace(plan, model_path=str(published))
    base, tokenizer = generation.load_base(whole, False), generation.load_tokenizer(whole)
    (expected,) = generation.ask(base, tokenizer, chat.THREE_QUESTIONS[:1], plan.max_new_tokens)
    assert expected.text and publishing.run_snippet(published, OPEN) == expected.text
    monkeypatch.chdir(tmp_path)
    run = run_of("somebody/a-base", trained_adapter, tmp_path)
    code = publishing.snippet_of(publishing.build(run, "me/tuned", tmp_path / "me" / "tuned"))
    assert "quantization_config=" in code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_a_failed_build_keeps_the_old_folder(plan: Plan, copy: Path, monkeypatch: Patch) -> None:
    before = contents(copy)
    instead_of_merging(monkeypatch, copy)
    full = Mock(side_effect=OSError(28, "No space left"))
    torn = Mock(side_effect=SafetensorError("I/O error: No space left (os error 28)"))
    for name, fake, said in (
        ("card", lambda *args: "no card", r"README\.md is no card"),
        ("check", full, r"folder/: No space left\. Check .* Nothing was changed"),
        ("check", torn, r"folder/: .*\(os error 28\)\. Check .* Nothing was changed"),
    ):
        with monkeypatch.context() as patch, pytest.raises(CourseError, match=said):
            patch.setattr(publishing, name, fake)
            publishing.build(plan, OPEN, copy)
        assert contents(copy) == before and len(list(copy.parent.iterdir())) == 1
    (copy / "thesis.docx").write_text("mine")
    with pytest.raises(CourseError, match=r"in use: it holds thesis\.docx"):
        publishing.build(plan, OPEN, copy)


BEGIN, SHAPE, OTHER = "begin with 'Llama 3'", "expected USER/NAME", "is not a Llama of Meta"
SMALL, SMOLLM = "meta-llama/Llama-3.2-1B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(("base", "repo", "message"), [
    (LLAMA, "me/llama-3-medquad", ""), (LLAMA, "me/LLAMA-3.2-x", ""), (LLAMA, "me/Llama3-x", ""),
    (LLAMA, "me/llama_3", ""), (LLAMA, "me/Meta-Llama-3-x", BEGIN), (LLAMA, "me/my-llama", BEGIN),
    (LLAMA, "me/llama-2-x", BEGIN), (LLAMA, "me/llama-medquad", BEGIN),
    (SMALL, "me/llama-medquad", ""), (SMALL, "me/Llama-3.2-x", ""),
    (SMALL, "me/medquad-llama", "begin with 'Llama'"),
    (SMOLLM, "me/medquad-llama", ""), (SMOLLM, "me/llama-medquad", OTHER),
    ("embedded", "me/Llama-3-x", OTHER), ("somebody/tiny-llama", "me/llama-x", ""),
    (LLAMA, "name", SHAPE), (LLAMA, "me/a b", SHAPE), (LLAMA, "me/..", SHAPE), (LLAMA, "", SHAPE),
    (LLAMA, "https://a.b/c", SHAPE),
])  # fmt: skip
def test_a_name_is_valid_and_what_the_licence_allows(base: str, repo: str, message: str) -> None:
    with pytest.raises(CourseError, match=message) if message else nullcontext():
        publishing.check_name(repo, base)
    publishing.check_name(f"me/{publishing.licence_of(base).prefix}x", base)


def test_a_llama_names_its_base_and_carries_its_agreement(
    llama: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    plan, folder = llama
    text, notice, licence = ((folder / n).read_text() for n in ("README.md", "NOTICE", "LICENSE"))
    data = ModelCard(text).data
    assert (data.license, data.base_model) == ("llama3", LLAMA)
    assert "Built with Meta Llama 3" in text
    assert "under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc." in notice
    assert "https://llama.meta.com/llama3/license/" in licence and LLAMA in licence
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (LLAMA, COMMIT)
    assert len(json.loads((folder / "generation_config.json").read_text())["eos_token_id"]) == 2
    with pytest.raises(CourseError, match="LICENSE lacks the agreement"):
        publishing.push(folder, NAME, "http://127.0.0.1:9")
    monkeypatch.chdir(plan.out)
    given, out = tmp_path / "given.txt", tmp_path / "out"
    with pytest.raises(CourseError, match=r"given\.txt is not the Meta Llama 3"):
        publishing.build(plan, NAME, out, licence=given)
    with pytest.raises(CourseError, match=r"given\.txt is not the Apache License"):
        publishing.agreement(tiny(), publishing.licence_of(tiny()), given)
    given.write_text("MIT License")
    with pytest.raises(CourseError, match=r"given\.txt is not the Meta Llama 3 Community License"):
        publishing.build(plan, NAME, out, licence=given)
    given.write_text("META LLAMA 3 COMMUNITY\nLICENSE AGREEMENT\n\n(a stand-in for the text)")
    publishing.build(plan, NAME, out, licence=given)
    assert (out / "LICENSE").read_text() == given.read_text()


def test_a_file_that_only_its_owner_may_read_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").chmod(0o600)
    with pytest.raises(CourseError, match=r"model\.safetensors cannot be read by other accounts"):
        publishing.check(copy, OPEN)


def test_a_card_without_code_is_a_message(copy: Path) -> None:
    (copy / "README.md").write_text("Nothing to run.")
    with pytest.raises(CourseError, match=r"the card in folder/ shows no Python code: build"):
        publishing.snippet_of(copy)


APACHE = "Apache License\n  Version 2.0, January 2004"
LLAMA_32 = "LLAMA 3.2 COMMUNITY\nLICENSE AGREEMENT"


@pytest.mark.parametrize(("name", "text", "licence"), [
    ("mylab-llama-3.2-1b", LLAMA_32, "llama3.2"), ("derm", LLAMA_32, "llama3.2"),
    ("mylab-llama-3.2-1b", "", "unknown"), ("SmolLM2-135M-Instruct", "mine", "unknown"),
    ("derm", APACHE, "apache-2.0"),
])  # fmt: skip
def test_of_a_local_base_nothing_is_claimed_that_its_folder_does_not_say(
    name: str, text: str, licence: str, plan: Plan, tmp_path: Path
) -> None:
    base = tmp_path / name
    base.mkdir()
    (base / "LICENSE.txt").write_text(text)
    local = dataclasses.replace(plan, profile="small", model_id=name, model_path=str(base))
    terms = publishing.licence_of(local)
    assert terms.id == licence
    nothing = publishing.Metrics({}, {}, {}, {}, ())
    words = publishing.card("me/llama-derm", local, nothing, True, "")
    data, credits = ModelCard(words).data, publishing.notice(local, "sample")
    assert (data.license, data.get("base_model")) == (licence, None)
    assert "HuggingFaceTB" not in words and f"huggingface.co/{name}" not in words + credits
    assert "developed by:** not stated" in words and "tuned from:** a model in a loc" in words
    assert ("Built with Llama" in words) == (licence == "llama3.2")
    copied = publishing.agreement(local, terms)
    assert copied.startswith(publishing.INCOMPLETE) == (licence == "unknown" and not text)
    if licence == "llama3.2":
        with pytest.raises(CourseError, match="must begin with 'Llama'"):
            publishing.check_name("me/derm-qa", local)
    (given := tmp_path / "given").write_text("META LLAMA 3 COMMUNITY LICENSE AGREEMENT")
    told = publishing.licence_of(local, given)
    assert told.id == "llama3", "the user says it"
    assert publishing.agreement(local, told, given) == given.read_text()


@pytest.mark.parametrize(("base", "licence"), [
    ("embedded", "apache-2.0"), ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    (LLAMA, "llama3"), ("meta-llama/Llama-3.1-8B", "llama3.1"), ("someone/else", "unknown"),
    ("meta-llama/Llama-3.9-1B", "unknown"), ("x/Hermes-Llama-3.1-8B", "llama3.1"),
    ("huggyllama/llama-30b", "unknown"), ("someone/tiny-llama", "unknown"),
    ("a/open-llama-3b-v2", "unknown"),
])  # fmt: skip
def test_a_licence_is_known_or_unknown(base: str, licence: str) -> None:
    assert publishing.licence_of(base).id == licence
    assert {profile.licence for profile in BASES.values()} <= publishing.LICENCES.keys()


OLD_ONES = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.0",
            "requests", "urllib3", "charset_normalizer")  # fmt: skip


@pytest.mark.full  # it downloads 14 MB, and two processes import torch
def test_an_older_transformers_answers_the_same(published: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--target", str(tmp_path / "old"), *OLD_ONES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip(f"transformers 4.57 cannot be installed here: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-1000:]
    code = publishing.snippet_of(published).replace('device_map="auto"', 'dtype="float32"')
    code, said = code + "import transformers\nprint(transformers.__version__)", {}
    for folder in (str(tmp_path / "old"), ""):
        here, env = published.parents[1], {**os.environ, "PYTHONPATH": folder}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        *answer, version = done.stdout.splitlines()
        said[version] = answer
    old, new = said.pop("4.57.6"), said.popitem()[1]
    assert old == new and any(new)


def test_a_user_of_the_hub_may_have_the_same_name_here(copy: Path, monkeypatch: Patch) -> None:
    card = copy / "README.md"
    card.write_text(card.read_text().replace(NAME, "lovelace/tiny") + "\nMade by lovelace.\n")
    monkeypatch.setattr("getpass.getuser", lambda: "lovelace")
    publishing.check(copy, "lovelace/tiny")
    with pytest.raises(CourseError, match="your user name"):
        publishing.check(copy, "byron/tiny")


EOS, PAD = r'"eos_token_id": \[.*?\]', r'"pad_token_id": \d+'


@pytest.mark.parametrize(("kind", "name", "old", "new", "message"), [
    ("tiny", "README.md", r"\Z", "hf_" + "a1B2" * 9, "a token of the Hub"),
    ("tiny", "tokenizer.json", r"\Z", "AKIA" + "A1B2" * 4, "an access key"),
    ("tiny", "config.json", r"\Z", "an odd one", "your Hub token"),
    ("tiny", "NOTICE", r"\Z", "see /home/ada/runs", r"a local path \(/home/ada\)"),
    ("tiny", "README.md", r"\Z", r"C:\\Users\\ada", "a local path"),
    ("tiny", "model.safetensors", '"format":"pt"', '"made":"/home/ada"', "a local path"),
    ("tiny", "chat_template.jinja", r"\Z", "by Lovelace", r"your user name \(Lovelace\)"),
    ("tiny", "tokenizer.json", r"\Z", str(Path.cwd()), "a path of this machine"),
    ("tiny", "pytorch_model.bin", r"\Z", "", r"pytorch_model\.bin does not belong"),
    ("tiny", "README.md", "tags:", "tags: a: b", "README.md has no readable header"),
    ("tiny", "generation_config.json", r"\}", "", "generation_config.json is damaged"),
    ("tiny", "generation_config.json", EOS, '"eos_token_id": [1]', r"not stop at <\|eot_id\|>"),
    ("tiny", "generation_config.json", '"do_sample": false,', "", "must be greedy"),
    ("tiny", "config.json", r'"rope_theta": [\d.]+\n\}', '"x": 1\n}', "must repeat rope_theta"),
    ("tiny", "tokenizer_config.json", "PreTrainedTokenizerFast", "Backend", "must name Pre"),
    ("tiny", "tokenizer_config.json", "additional_s", "extra_s", "additional_special_tokens"),
    ("tiny", "generation_config.json", PAD, '"pad_token_id": 4', "must pad with a token that"),
    ("llama", "README.md", "Built with Meta Llama 3", "", "must say 'Built with Meta Llama 3'"),
    ("llama", "NOTICE", "Meta Platforms", "", "NOTICE hold Meta's line"),
    ("llama", "NOTICE", "10.1186/", "", "must attribute MedQuAD"),
    ("llama", "adapter_config.json", COMMIT, "", "must name the Hub id and the revision"),
])  # fmt: skip
def test_a_secret_a_strange_file_or_a_broken_licence_is_refused(
    copy: Path, llama: Run, monkeypatch: Patch, kind: str, name: str, old: str,
    new: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("getpass.getuser", lambda: "lovelace")
    monkeypatch.setenv("HF_TOKEN", "an odd one")
    folder = copy if kind == "tiny" else Path(shutil.copytree(llama[1], copy.with_name("llama")))
    publishing.check(folder, NAME)
    (folder / name).touch()
    text = (folder / name).read_bytes().decode("latin-1")
    (folder / name).write_bytes(re.sub(old, new, text, flags=re.DOTALL).encode("latin-1"))
    with pytest.raises(CourseError, match=message) as error:
        publishing.check(folder, NAME)
    assert "a1B2" not in str(error.value) and "odd" not in str(error.value), "it shows no secret"


def test_the_command_sends_only_without_dry_run(
    plan: Plan, copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(publishing, "push", lambda *args: sent.append(args) or "its address")
    instead_of_merging(monkeypatch, copy)
    out = copy.with_name("out")
    given = ["publish", "--profile", "tiny", "--runs", plan.out, "--out", str(out), "--repo", OPEN]
    assert cli.main([*given, "--dry-run"]) == 0
    assert "nothing was sent" in capsys.readouterr().out and sent == []
    assert contents(out) == contents(copy)
    assert cli.main(given) == 0
    assert "published: its address" in capsys.readouterr().out and sent == [(out, OPEN)]


# ---- a Hub on this machine ------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """What a push needs of the Hub's HTTP API, for one repository. It keeps what arrives.

    It refuses with the status ``deny``, and cuts the connection at the step ``dies_at``.
    """

    protocol_version, lock = "HTTP/1.1", threading.Lock()

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return data

    def do_POST(self) -> None:
        sent, steps = self.body(), ("yaml", "create", "preupload", "batch", "commit")
        with Hub.lock:
            step = next((step for step in steps if step in self.path), "info")
            if put := self.path.startswith("/put/"):
                step = "second" if Hub.blobs else "first"
            if Hub.dies_at == step:
                self.close_connection = True
                self.connection.close()
                return
            Hub.log.append(step)
            status, value = Hub.deny, {"error": "Invalid username or password."}
            if not status:
                assert put or self.headers["Authorization"] == f"Bearer hf_{'t' * 34}"
                asked = [sent] if put else [json.loads(line) for line in sent.splitlines()]
                status, value = getattr(self, "put" if put else step)(*asked)
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST  # noqa: N815

    def put(self, data: bytes) -> tuple[int, Any]:
        Hub.blobs[hashlib.sha256(data).hexdigest()] = data
        return 200, {}

    def info(self) -> tuple[int, Any]:
        card = ModelCard(Hub.files.get("README.md", b"").decode()).data.to_dict()
        names = [{"rfilename": name} for name in Hub.files]
        return 200, {"id": NAME, "sha": self.sha(), "siblings": names, "cardData": card}

    def sha(self) -> str:
        return f"{Hub.log.count('committed'):040x}"

    def create(self, asked: Any) -> tuple[int, Any]:
        url = f"{Hub.address}/{asked['organization']}/{asked['name']}"
        if Hub.files is not None:
            return 409, {"error": "You already created this model repo", "url": url}
        Hub.files = {".gitattributes": b"*.safetensors filter=lfs"}
        return 200, {"url": url}

    def yaml(self, asked: Any) -> tuple[int, Any]:
        return 200, {"warnings": [], "errors": []}

    def preupload(self, asked: Any) -> tuple[int, Any]:
        for file in asked["files"]:
            large = file["path"].endswith((".safetensors", "tokenizer.json"))
            file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        return 200, asked

    def batch(self, asked: Any) -> tuple[int, Any]:
        for blob in asked["objects"]:
            if blob["oid"] not in Hub.blobs:
                blob["actions"] = {"upload": {"href": f"{Hub.address}/put/{blob['oid']}"}}
        return 200, {"transfer": "basic", "objects": asked["objects"]}

    def commit(self, header: Any, *changes: Any) -> tuple[int, Any]:
        if header["value"].get("parentCommit") != self.sha():
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        for kind, value in ((change["key"], change["value"]) for change in changes):
            if kind == "deletedFile":
                del Hub.files[value["path"]]
            else:
                small = base64.b64decode(value.get("content", ""))
                Hub.files[value["path"]] = small if kind == "file" else Hub.blobs[value["oid"]]
        Hub.log.append("committed")
        url = f"{Hub.address}/{NAME}/commit/{self.sha()}"
        return 200, {"success": True, "commitOid": self.sha(), "commitUrl": url}


@pytest.fixture
def hub(monkeypatch: Patch) -> Iterator[Any]:
    """A running Hub that knows the token of the environment; nobody waits between two tries."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    monkeypatch.setattr(server, "handle_error", lambda *_: None)  # connections that it cuts
    Hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    Hub.files, Hub.blobs, Hub.log, Hub.deny, Hub.dies_at = None, {}, [], 0, ""
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "t" * 34)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    yield Hub
    server.shutdown()
    server.server_close()


def arrived(hub: Any) -> dict[str, bytes]:
    return {n: b for n, b in (hub.files or {}).items() if n != ".gitattributes"}


@pytest.mark.full
def test_a_push_brings_every_byte_in_one_commit(hub: Any, copy: Path) -> None:
    assert publishing.push(copy, NAME, hub.address) == f"{hub.address}/{NAME}"
    assert arrived(hub) == contents(copy) and hub.log.count("commit") == 1
    hub.files["old.safetensors"] = b"old"
    (copy / "NOTICE").write_text((copy / "NOTICE").read_text() + "More.\n")
    publishing.push(copy, NAME, hub.address)
    assert arrived(hub) == contents(copy), "what is no longer in the folder goes"
    assert hub.log.count("first") + hub.log.count("second") == 2, "the weights had arrived"


@pytest.mark.full
@pytest.mark.parametrize("step", ["create", "preupload", "batch", "first", "second", "commit"])
def test_a_broken_push_leaves_nothing_half_made_and_goes_on(
    hub: Any, copy: Path, step: str
) -> None:
    hub.dies_at = step
    with pytest.raises(CourseError, match=r"^[^\n]*connection broke .* folder/ is kept[^\n]*$"):
        publishing.push(copy, NAME, hub.address)
    assert arrived(hub) == {} and len(hub.blobs) == {"second": 1, "commit": 2}.get(step, 0)
    hub.dies_at = ""
    publishing.push(copy, NAME, hub.address)
    assert arrived(hub) == contents(copy)
    assert hub.log.count("first") + hub.log.count("second") == 2, "nothing is sent twice"


@pytest.mark.full
def test_a_repository_that_is_not_ours_is_left_alone(hub: Any, copy: Path) -> None:
    card = {"README.md": b"---\ntags: [x]\n---\nMine."}
    for theirs in (card, {"README.md": b"no metadata"}, {"model.safetensors": b"no card"}):
        hub.files = dict(theirs)
        with pytest.raises(CourseError, match=f"{NAME} exists and holds {min(theirs)}, which"):
            publishing.push(copy, NAME, hub.address)
        assert hub.files == theirs


@pytest.mark.full
def test_every_refusal_of_the_hub_is_one_line(hub: Any, copy: Path, monkeypatch: Patch) -> None:
    def refused(words: str) -> None:
        with pytest.raises(CourseError, match=rf"^[^\n]*{words}[^\n]*is kept[^\n]*$"):
            publishing.push(copy, NAME, hub.address)

    for hub.deny, words in ((403, "may not write"), (401, "not know the token"), (418, "refused")):
        refused(words)
    hub.deny = 0
    with monkeypatch.context() as patch:  # somebody commits between our look and our commit
        patch.setattr(Hub, "sha", lambda self: f"{len(hub.log):040x}")
        refused("A commit has happened since")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        refused("HF_HUB_OFFLINE is set")
    monkeypatch.setattr(publishing, "hub_token", lambda: None)
    refused("no Hub token")
