"""``medquad data``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from medquad_utils import data
from medquad_utils.cleaning import NAMES, Effect, Row
from medquad_utils.cli import main

REPO = Path(__file__).parent.parent
FILES = {"train.parquet", "validation.parquet", "test.parquet", "leakage.json", "data.json"}
NAN = float("nan")


def made_up(count: int = 80) -> list[dict[str, Any]]:
    """Rows in the Hub's columns about as many diseases, all different, none of them changed by cleaning."""
    return [
        {"qtype": "causes", "Question": f"What causes Disease {n} ?", "Answer": f"It is caused by agent number {n} alone."}
        for n in range(count)
    ]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def run(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str | Path) -> str:
    """What ``medquad data`` prints where nothing is wrong."""
    status = main(["data", "--out", str(out), *map(str, arguments)])
    said = capsys.readouterr()
    assert (status, said.err) == (0, "")
    assert {p.name for p in out.iterdir()} == FILES
    return said.out


def table(text: str, head: str) -> dict[str, str]:
    """The two columns below a heading of what was printed."""
    (block,) = [b for b in text.split("\n\n") if b.split("\n")[0] == head]
    pairs = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in block.split("\n")[1:]]
    return dict(pairs)


def parts(out: Path) -> dict[str, list[Row]]:
    return {name: data.read_rows(out / f"{name}.parquet") for name in data.PARTS}


# ---- what it makes --------------------------------------------------------------------------------------------------


def test_the_sample_is_split_and_every_number_printed_is_the_one_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, tmp_path)
    card = json.loads((tmp_path / "data.json").read_text())
    rows = parts(tmp_path)
    assert {name: int(n.split()[0].replace(",", "")) for name, n in table(text, "part").items()} == {k: len(v) for k, v in rows.items()}
    assert list(table(text, "cleaning rule")) == list(NAMES) == list(card["cleaning"])
    assert sum(len(r) for r in rows.values()) == card["loaded"] - sum(e["dropped"] for e in card["cleaning"].values())
    assert sum(int(n.replace(",", "")) for n in table(text, "question type").values()) == card["loaded"]
    assert sum(int(n.replace(",", "")) for n in table(text, "source").values()) == card["loaded"]
    leakage = json.loads((tmp_path / "leakage.json").read_text())
    assert leakage == card["leakage"]
    for pair in ("train / validation", "train / test", "validation / test"):
        assert {n: s for n, s in leakage[pair].items() if n != "8-gram"} == dict.fromkeys(
            ("question", "normalised question", "focus", "answer", "answer but boilerplate"), 0
        )
        assert table(text, f"leakage, {pair}")["8-gram"] == f"{leakage[pair]['8-gram']:.1%}"
    assert f"written to {tmp_path}: " in text


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_same_rows_in_any_kind_of_file_are_split_alike(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_table(tmp_path / f"mine.{kind}", made_up())
    text = run(capsys, tmp_path / "out", "--source", kind, "--path", path)
    assert text.startswith("80 answered rows (0 without an answer, 0 skipped)")
    expected = data.split(data.load_table(path).rows)
    assert parts(tmp_path / "out") == {name: getattr(expected, name) for name in data.PARTS}
    assert all((tmp_path / "out" / f"{name}.parquet").stat().st_size > 0 for name in data.PARTS)


def test_the_same_run_twice_writes_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_table(tmp_path / "mine.jsonl", made_up())
    for arguments in ((), ("--source", "jsonl", "--path", path)):
        first, again, other = (tmp_path / name for name in ("first", "again", "other"))
        texts = [run(capsys, out, *arguments).replace(str(out), "OUT") for out in (first, again, again)]
        assert len(set(texts)) == 1
        run(capsys, other, "--seed", "7", *arguments)
        for name in FILES:
            assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / "test.parquet").read_bytes() != (other / "test.parquet").read_bytes()


def test_answers_that_are_no_text_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_up()
    holes = {3: NAN, 5: None, 8: "", 13: "  "}
    for number, hole in holes.items():
        rows[number]["Answer"] = hole
    path = write_table(tmp_path / "mine.jsonl", rows)
    text = run(capsys, tmp_path / "out", "--source", "jsonl", "--path", path)
    assert text.startswith("76 answered rows (0 without an answer, 4 skipped)")
    card = json.loads((tmp_path / "out" / "data.json").read_text())
    assert card["skipped"] == [f"row {number + 1}: answer is not text" for number in holes]
    table = {c: [r[c] if isinstance(r[c], str) else None for r in rows] for c in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table({**table, "Answer": [NAN] * 80}), tmp_path / "all.parquet")
    assert "holds no question with an answer" in refused(
        capsys, tmp_path / "none", "--source", "parquet", "--path", tmp_path / "all.parquet"
    )


def test_a_rule_can_be_left_out_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*made_up(), *({**r, "Answer": "Four words are here."} for r in made_up(10)), made_up(1)[0]]
    path = write_table(tmp_path / "mine.csv", rows)
    counts = table(run(capsys, tmp_path / "all", "--source", "csv", "--path", path), "cleaning rule")
    assert (counts["under five words"], counts["exact duplicate"]) == ("0 changed, 10 dropped", "0 changed, 1 dropped")
    off = ("--without", "under five words", "--without", "exact duplicate")
    counts = table(run(capsys, tmp_path / "out", "--source", "csv", "--path", path, *off), "cleaning rule")
    assert set(NAMES) - set(counts) == {"under five words", "exact duplicate"}
    assert sum(map(len, parts(tmp_path / "out").values())) == 91


def test_a_specialty_keeps_its_own_rows_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hearts = [{**r, "Question": f"What causes Heart disease {n} ?"} for n, r in enumerate(made_up())]
    path = write_table(tmp_path / "mine.jsonl", [*made_up(), *({**r, "Answer": f"{r['Answer']} Really."} for r in hearts)])
    run(capsys, tmp_path / "out", "--source", "jsonl", "--path", path, "--specialty", "cardiology")
    kept = [r["question"] for rows in parts(tmp_path / "out").values() for r in rows]
    assert sorted(kept) == sorted(r["Question"] for r in hearts)
    assert json.loads((tmp_path / "out" / "data.json").read_text())["specialty"] == "cardiology"


def test_a_column_focus_splits_questions_in_ones_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**r, "Question": f"why do people get it, number {n}?", "focus": f"Disease {n // 2}"} for n, r in enumerate(made_up())]
    text = run(capsys, tmp_path / "out", "--source", "jsonl", "--path", write_table(tmp_path / "mine.jsonl", rows))
    assert "Hub's columns" not in text, "nothing to recover a focus from"
    foci = [{r["focus"] for r in part} for part in parts(tmp_path / "out").values()]
    assert sum(map(len, foci)) == len(set().union(*foci)) == 40


def test_a_group_too_large_and_a_lost_unit_are_told_to_the_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        *made_up(),
        *({**r, "Question": "What causes Gout ?", "Answer": f"Levels over {n} g/L cause it at once."} for n, r in enumerate(made_up(20))),
    ]
    text = run(capsys, tmp_path / "out", "--source", "jsonl", "--path", write_table(tmp_path / "mine.jsonl", rows))
    assert "group 'gout' (20 rows) is larger than a part of 10: kept in training" in text
    assert "20 numbers may have lost the prefix of their unit" in text
    assert "Levels over 19 g/L cause it" in text


def test_the_command_on_the_real_data(
    medquad_xml: Path, real_cleaned: tuple[list[Row], dict[str, Effect]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "real" / "data"
    text = run(capsys, out, "--source", "xml", "--path", medquad_xml)
    assert text.startswith("16,407 answered rows (5 without an answer, 0 skipped)")
    assert table(text, "source") == {
        "GHR": "5,430", "GARD": "5,389", "NIDDK": "1,192", "NINDS": "1,088", "MPlusHealthTopics": "981", "NIHSeniorHealth": "769",
        "CancerGov": "729", "NHLBI": "559", "CDC": "270",
    }  # fmt: skip
    assert table(text, "question type") == {
        "information": "4,535", "symptoms": "2,748", "treatment": "2,442", "inheritance": "1,446", "frequency": "1,120",
        "genetic changes": "1,087", "causes": "727", "exams and tests": "653", "research": "395", "outlook": "361", "susceptibility": "324",
        "considerations": "235", "prevention": "210", "stages": "77", "complications": "46", "support groups": "1",
    }  # fmt: skip
    kept, effects = real_cleaned
    assert table(text, "cleaning rule") == {name: f"{e.changed:,} changed, {e.dropped:,} dropped" for name, e in effects.items()}
    written = parts(out)
    assert sum(map(len, written.values())) == len(kept)
    assert all(abs(len(rows) / len(kept) - want) < 0.02 for rows, want in zip(written.values(), (0.8, 0.1, 0.1), strict=True))
    leakage = json.loads((out / "leakage.json").read_text())
    common = leakage.pop("boilerplate")
    for shares in leakage.values():
        assert [shares[name] for name in ("question", "normalised question", "focus", "answer but boilerplate")] == [0, 0, 0, 0]
    assert {b["answer"] for b in common} == set(data.boilerplate(kept))
    assert len(table(text, "boilerplate")) == len(common)
    assert "100.0% of them right" in text
    assert str(tmp_path) not in (out / "data.json").read_text()


# ---- what it refuses ------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str | Path) -> str:
    """The one line on stderr of a run that ends with status 1, says nothing else and writes nothing."""
    status = main(["data", "--out", str(out), *map(str, arguments)])
    said = capsys.readouterr()
    assert (status, said.out) == (1, "")
    (line,) = said.err.splitlines()
    assert line.startswith("medquad: ")
    assert not out.exists()
    return line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--source", "web"), "unknown source 'web': expected one of sample, hub, xml, csv, jsonl, parquet"),
        (("--source", "xml"), "source 'xml' needs data_path: the folder to read. Add -p data_path=... (medquad data: --path ...)"),
        (("--source", "xml", "--path", "nowhere"), "no XML files under 'nowhere': expected a clone of MedQuAD"),
        (("--source", "csv", "--path", "nowhere.csv"), "no file 'nowhere.csv': expected a .csv, .jsonl or .parquet file with the columns"),
        (("--source", "csv", "--path", "empty.csv"), "(empty.csv) holds no question with an answer"),
        (("--source", "csv", "--path", "columns.csv"), "columns.csv lacks the columns qtype, answer: it has question, reply. Rename them."),
        (("--source", "parquet", "--path", "garbage.parquet"), "cannot read garbage.parquet as parquet"),
        (("--source", "csv", "--path", "one.csv"), "1 rows in 1 groups are too few for three parts"),
        (("--source", "hub"), "could not be loaded from the Hub"),
        (("--without", "spelling"), "no cleaning rule 'spelling': there are link list, phenotype list"),
        (("--without", "spelling", "--without", "white space"), "no cleaning rule 'spelling': "),
        (("--specialty", "magic"), "no specialty 'magic': there are cardiology, oncology"),
        (("--source", "csv", "--path", "one.csv", "--specialty", "cardiology"), "0 rows about 'cardiology' are too few to train on"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.csv").touch()
    Path("columns.csv").write_text("question,reply\na,b\n")
    Path("garbage.parquet").write_bytes(b"PAR1 and no more")
    write_table(Path("one.csv"), made_up(1))
    assert said in refused(capsys, tmp_path / "out", *arguments)


def test_a_mistake_leaves_an_earlier_run_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for arguments in (("--without", "spelling"), ("--specialty", "haematology"), ("--source", "csv", "--path", "nowhere.csv")):
        assert main(["data", "--out", str(tmp_path), *arguments]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a file").write_text("mine")
    for out in (tmp_path / "a file", tmp_path / "a file" / "data"):
        assert main(["data", "--out", str(out)]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert re.fullmatch(r"medquad: cannot write train\.parquet: .*choose another folder.*\n", said.err)
    assert [p.name for p in tmp_path.iterdir()] == ["a file"]
    assert (tmp_path / "a file").read_text() == "mine"


def test_a_full_disk_in_mid_run_leaves_no_card_and_no_half_written_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, tmp_path)
    real, calls = pyarrow.parquet.write_table, []

    def full(rows: Any, where: Path) -> None:
        real(rows, where)
        calls.append(where)
        if len(calls) == 2:
            where.write_bytes(b"PAR1")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    assert main(["data", "--out", str(tmp_path), "--seed", "3"]) == 1
    assert "cannot write validation.parquet: No space left on device. Free some space" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == FILES - {"data.json"}
    assert all(rows for rows in parts(tmp_path).values())


def test_in_a_process_of_its_own_a_mistake_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "medquad_utils.cli", "data", "--source", "csv", "--path", "nowhere.csv"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"medquad: no file 'nowhere\.csv': [^\n]*\n", done.stderr)
    assert not list(tmp_path.iterdir())
