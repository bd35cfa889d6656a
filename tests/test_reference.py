"""Reference runs: what they hold, what they must not hold, and how the lessons find them."""

from __future__ import annotations

import getpass
import json
import platform
import re
from pathlib import Path
from typing import Any

import pandas
import pytest
from conftest import REPO, tiny

from medquad_utils import data, reference
from medquad_utils.files import Row, write_json
from medquad_utils.splits import ngrams

SECONDS = {"04 train with sft": 61.25, "05 ask the model": 30.0}
ASKED = ["What is gout?", "What are the long-term effects of the new treatments of gout?"]


@pytest.fixture
def finished(tmp_path: Path) -> Any:
    """The plan of a run on ``tiny`` that left two lessons' metrics and two answered questions."""
    plan = tiny(tmp_path / "runs")
    copied = data.prepare(plan).train[0]["answer"]
    said = {"question": ASKED[0], "base": "No idea.", "tuned": f"Well, now: {copied} So it is."}
    write_json(plan.folder / "metrics" / "ask.json", {"answers": [said], "headline": "asked"})
    train = {"plan": plan.as_dict(), "headline": "trained", "train_curve": [(1, 2.5), (2, 1.5)]}
    write_json(plan.folder / "metrics" / "train.json", train)
    table = [(arm, q, f"{arm} answer") for q in ASKED for arm in ("base", "tuned", "nearest")]
    (plan.folder / "evaluation").mkdir()
    answers = pandas.DataFrame(table, columns=["arm", "question", "answer"])
    answers.to_parquet(plan.folder / "evaluation" / "answers.parquet")
    return plan


def kept(folder: Path) -> dict[str, Any]:
    """File -> content of a reference run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): json.loads(p.read_text("utf-8")) for p in files}


def texts(value: Any) -> list[str]:
    """Every text in a JSON value, the keys of its objects as well."""
    return [json.loads(text) for text in re.findall(r'"(?:[^"\\]|\\.)*"', json.dumps(value))]


def shared(value: Any, rows: list[Row]) -> set[tuple[str, ...]]:
    held = ngrams(text for row in rows for text in (row["question"], row["answer"]))
    return set(ngrams(texts(value))).intersection(held)


def test_a_reference_run_is_found_by_its_label_and_holds_the_numbers(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference.write(finished, tmp_path / "kept" / "small", SECONDS)
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "kept")
    files = kept(tmp_path / "kept" / "small")
    assert [*files] == ["answers.json", "metrics/ask.json", "metrics/train.json", "reference.json"]
    about = files["reference.json"]
    assert about["data"]["source"] == "sample" and about["data"]["loaded"] > 1000
    assert about["seconds"]["04 train with sft"] == 61.2 and about["plan"]["lora_r"] == 16
    said = {"question": ASKED[0], "base": "base answer", "tuned": "tuned answer"}
    assert files["answers.json"]["held out"] == [said]
    yours = {"train_curve": [(1, 3.0)]}
    runs = reference.beside("train", yours)
    label = f"embedded on the course's sample, CPU, {about['date']}"
    assert list(runs) == ["your run", label] and runs["your run"] is yours
    assert runs[label]["train_curve"] == [[1, 2.5], [2, 1.5]]
    counts = reference.counts_beside(yours)
    assert list(counts) == ["your run", label] and counts["your run"] is yours
    for kind in ("by_source", "by_qtype"):
        assert sum(counts[label][kind].values()) == about["data"]["loaded"]


def test_a_sentence_of_the_data_is_replaced_and_its_neighbours_stay(
    finished: Any, tmp_path: Path
) -> None:
    parts = data.prepare(finished)
    rows = [*parts.train, *parts.validation, *parts.test]
    before = json.loads((finished.folder / "metrics" / "ask.json").read_text("utf-8"))
    assert shared(before, rows), "the sentence is planted"
    reference.write(finished, tmp_path / "kept", SECONDS)
    files = kept(tmp_path / "kept")
    assert not shared(files, rows)
    for place in (str(tmp_path), str(Path.home()), platform.node()):
        assert place not in json.dumps(files), "a place of this machine"
    assert not {getpass.getuser(), "out", "data_path", "model_path"} & {*texts(files)}
    (said,) = files["answers.json"]["three questions"]
    assert said["tuned"] == "Well, now: [as in MedQuAD]. So it is." and said["base"] == "No idea."
    assert files["metrics/ask.json"]["answers"] == [said]


def test_a_stretch_of_seven_words_may_stay() -> None:
    row = {"question": "Q", "answer": "one two three four five six seven eight nine"}
    asked = ["One two, three four five six seven?", "now one two three four five six seven eight!"]
    asked += ["one two three four five six seven eight nine, three four five six seven eight."]
    asked += [f"{row['answer']}. {row['answer']}"]
    found = reference.without_sentences(asked, [row])
    hidden = "[as in MedQuAD]"
    assert found[:2] == [asked[0], f"now {hidden}!"]
    assert found[2:] == [f"{hidden}, three four five six seven eight.", f"{hidden}. {hidden}"]


def test_the_largest_profile_is_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    assert reference.beside("ask", {"n": 1}) == {"your run": {"n": 1}}
    assert capsys.readouterr().out == "No reference run of this lesson is in this checkout.\n"
    about = {"hardware": "Card X, 80 GB", "date": "2026-11-30", "data": {"source": "xml"}}
    for profile, model in {"llama-8b": "a/Llama-8B", "small": "b/Smol"}.items():
        write_json(tmp_path / profile / "reference.json", about | {"model": model})
        write_json(tmp_path / profile / "metrics" / "ask.json", {"n": profile})
    expected = {"your run": {}, "Llama-8B on MedQuAD, Card X, 2026-11-30": {"n": "llama-8b"}}
    assert reference.beside("ask", {}) == expected and not capsys.readouterr().out


@pytest.mark.full
def test_no_committed_reference_run_holds_a_sentence_of_medquad(real_rows: list[Row]) -> None:
    runs = [path.parent for path in (REPO / "notebooks" / "reference").glob("*/reference.json")]
    assert runs
    assert not shared([kept(run) for run in runs], real_rows)
