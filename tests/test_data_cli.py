"""``medquad data``: what it prints and writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from medquad_utils import files, splits
from medquad_utils.cleaning import NAMES
from medquad_utils.cli import main


def own(path: Path, *gout: str) -> tuple[str, ...]:
    """Arguments for a file of 80 diseases with one answer each, and further answers about gout."""
    asked = [(f"Disease {n}", f"It is caused by agent number {n} alone.") for n in range(80)]
    asked += [("Gout", answer) for answer in gout]
    rows = [{"qtype": "causes", "question": f"What causes {d} ?", "answer": a} for d, a in asked]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return "--source", "jsonl", "--data-path", str(path)


def run(capsys: Any, out: Path, *arguments: str) -> str:
    """What ``medquad data`` prints when nothing is wrong."""
    assert main(["data", "--out", str(out), *arguments]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    return str(text)


def table(text: str, head: str) -> dict[str, str]:
    """The rows of a printed table: name -> its cells, each behind a space."""
    (block,) = [b for b in text.split("\n\n") if b.split("\n")[0] == head]
    lines = [line for line in block.split("\n")[1:] if not line.startswith(" ")]
    return {name: " ".join(cells) for name, *cells in (re.split(r"\s{2,}", ln) for ln in lines)}


def test_printed_numbers_are_the_written_ones(tmp_path: Path, capsys: Any) -> None:
    text = run(capsys, tmp_path)
    card = json.loads((tmp_path / "data.json").read_text())
    sizes = {name: len(files.read_rows(tmp_path / f"{name}.parquet")) for name in splits.PARTS}
    assert table(text, "rows") == {name: str(size) for name, size in sizes.items()}
    assert list(table(text, "cleaning")) == list(NAMES) == list(card["cleaning"])
    dropped = sum(effect["dropped"] for effect in card["cleaning"].values())
    parts = f"{card['loaded']:,} rows = {sum(sizes.values()):,} in the parts + {dropped} dropped"
    assert parts in text
    assert sum(sizes.values()) == card["loaded"] - dropped
    lost = card["unanswered"] + sum(card["skipped"].values())
    assert card["records"] == card["loaded"] + lost
    assert table(text, "by qtype") == {k: str(n) for k, n in card["by_qtype"].items()}
    shares = {p: " ".join(f"{n:.1%}" for n in of.values()) for p, of in card["leakage"].items()}
    assert table(text, "leakage") == shares
    assert list(shares) == ["train / validation", "train / test", "validation / test"]
    assert str(tmp_path) not in json.dumps(card)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    run(capsys, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before, "the same bytes again"
    run(capsys, tmp_path, "--seed", "7")
    assert (tmp_path / "test.parquet").read_bytes() != before["test.parquet"]


def test_rule_that_is_left_out_keeps_its_rows(tmp_path: Path, capsys: Any) -> None:
    mine = own(tmp_path / "a.jsonl", "Four words are here.", *["Crystals in the toe cause it."] * 2)
    counts = table(run(capsys, tmp_path / "all", *mine), "cleaning")
    assert counts["under five words"] == counts["exact duplicate"] == "0 1"
    off = ("--without", "under five words", "--without", "exact duplicate")
    text = run(capsys, tmp_path / "off", *mine, *off)
    assert set(NAMES) - set(table(text, "cleaning")) == {"under five words", "exact duplicate"}
    assert sum(map(int, table(text, "rows").values())) == 83


def test_large_group_lost_units_and_skipped_rows_are_told(tmp_path: Path, capsys: Any) -> None:
    gout = [f"Levels over {n} g/L cause it at once." for n in range(20)]
    text = run(capsys, tmp_path / "out", *own(tmp_path / "a.jsonl", *gout, ""))
    assert text.startswith("101 records = 100 rows + 1 without an answer + 0 skipped\n100 rows = ")
    assert "group 'gout' (20 rows) is larger than a part of 10: kept in training" in text
    assert "20 numbers may have lost the prefix of their unit" in text
    units = text.split("units that may lack a prefix\n")[1].split("\n\n")[0]
    assert units.count(" g/L cause it") == 20


def test_own_rows_are_not_where_the_lessons_of_tiny_write(tmp_path: Path, capsys: Any) -> None:
    for words in (own(tmp_path / "a.jsonl"), ("--without", "white space"), ()):
        assert main(["data", "--runs", str(tmp_path / "runs"), *words]) == 0
    capsys.readouterr()
    assert (tmp_path / "runs" / "data" / "data.json").is_file()
    assert json.loads((tmp_path / "runs/tiny/data/data.json").read_text())["recipe"]["data"] == ""
