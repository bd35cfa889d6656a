"""``medquad evaluate`` as a user types it: one run to the end, and each mistake as one line before a model is loaded."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from medquad_utils import cli
from medquad_utils.assets import sample
from medquad_utils.data import write_rows

REPO = Path(__file__).parent.parent


def wrong(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake ends in."""
    assert cli.main(["evaluate", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medquad: ")
    return line


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Six questions of the sample about one condition, as a table with the columns of a spreadsheet."""
    path = tmp_path / "asked.csv"
    rows = sample.rows()[:6]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question", "Answers", "qtype", "focus", "source", "remark"])
        writer.writerows(
            [r["question"], json.dumps([r["answer"], "Nobody knows."]), r["qtype"], r["focus"], r["source"], "x"] for r in rows
        )
        writer.writerow(["What is this?", "", "", "", "", ""])
    return path


def test_questions_in_a_file_become_a_report(asked: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    rows = sample.rows()
    write_rows(tmp_path / "data" / "train.parquet", [r for r in rows[:120] if r["focus"] != rows[0]["focus"]])
    write_rows(tmp_path / "more.parquet", rows[:6])
    out = tmp_path / "evaluation"
    command = [
        sys.executable,
        "-m",
        "medquad_utils.cli",
        "evaluate",
        "--questions",
        str(asked),
        "--adapter",
        str(tiny_adapter),
        "--out",
        str(out),
    ]
    command += ["--data", str(tmp_path / "data"), "--archive", str(tmp_path / "more.parquet"), "--limit", "5", "--batch", "42"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "asked.csv: 5 questions" in done.stdout
    assert "1 x skipped: no reference answer is text (row 7)" in done.stdout
    assert "5 of 6 questions are drawn with seed 0" in done.stdout
    for arm in ("base", "tuned", "grounded", "nearest", "another disease"):
        assert f"\n{arm}  " in done.stdout
    assert f"written: {out / 'report.html'}" in done.stdout
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert {p.name for p in out.iterdir()} == {"report.html", "report.md", "metrics.json", "answers.parquet", "figures"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["recipe"]["archive_rows"] == metrics["recipe"]["training_rows"] + 6
    answers = pyarrow.parquet.read_table(out / "answers.parquet").to_pylist()
    assert sum(a["arm"] == "tuned" for a in answers) == 5
    assert all(a["references"][1] == "Nobody knows." for a in answers if a["arm"] == "base")
    assert not (tmp_path / "runs").exists()


def test_mistakes_in_the_questions_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no file 'nowhere.csv': expected a .csv" in wrong(capsys, "--questions", "nowhere.csv")
    path = tmp_path / "asked.jsonl"
    path.write_text('{"topic": "gout"}\n')
    assert "lacks a column question or prompt" in wrong(capsys, "--questions", str(path))
    path.write_text("")
    assert "holds no question with an answer" in wrong(capsys, "--questions", str(path))


@pytest.mark.parametrize("option", ["--limit", "--batch"])
def test_numbers_under_one_are_refused(asked: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected whole numbers over 0" in wrong(capsys, "--questions", str(asked), option, "0")


def test_mistakes_in_the_folders_and_the_profile_are_one_line(
    asked: Path, tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDQUAD_OUT", str(tmp_path / "runs"))
    given = ("--questions", str(asked), "--profile", "tiny")
    assert "no train.parquet in nowhere/" in wrong(capsys, *given, "--adapter", str(tiny_adapter), "--data", str(tmp_path / "nowhere"))
    assert "no adapter in nowhere/: lesson 04 trains one" in wrong(capsys, *given, "--adapter", str(tmp_path / "nowhere"))
    assert "unknown profile 'huge'" in wrong(capsys, "--questions", str(asked), "--profile", "huge")
    assert "no file" in wrong(capsys, *given, "--adapter", str(tiny_adapter), "--archive", str(tmp_path / "none.csv"))
