"""The benchmarks compare like with like, and what is written about them is what was measured. No times are tested."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import BENCHMARKS, benchmark


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    module: ModuleType = benchmark("data_speed")
    return module


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    made: dict[str, Any] = json.loads((BENCHMARKS / "results" / "data_speed.json").read_text(encoding="utf-8"))
    return made


@pytest.fixture(scope="module")
def few(speed: ModuleType, medquad_xml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole articles of three collections, some 200 answers: link lists, phenotype lists, headings and rows without a focus."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("9_CDC_QA", "2_GARD_QA", "5_NIDDK_QA"):
        speed.some(medquad_xml / name, 70, folder)
    return folder


# ---- the two arms ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arms(speed: ModuleType, few: Path) -> dict[str, Any]:
    """Ours as the benchmark runs it, in a process; plain in this one, which spares the imports."""
    return {"ours": speed.run("ours", few), "plain": speed.plain(few)}


def test_both_arms_give_the_same_rows_groups_parts_and_tokens(speed: ModuleType, arms: dict[str, Any]) -> None:
    speed.check(arms["ours"], arms["plain"])
    counts = arms["ours"]["counts"]
    assert 200 <= counts["loaded"] < 300
    assert counts["kept"] < counts["loaded"], "nothing was cleaned: the rows are too few to compare cleaning on"
    assert 20 < counts["groups"] < counts["kept"]
    assert counts["tokens"] > 30 * counts["kept"]


def test_every_stage_of_each_arm_is_timed(speed: ModuleType, arms: dict[str, Any]) -> None:
    assert list(arms["ours"]["seconds"]) == ["start", "parse", "clean", "split", "tokenise", "leakage"]
    assert list(arms["plain"]["seconds"]) == ["start", "parse", "clean", "split", "tokenise"]
    assert list(arms["ours"]["peak_mib"].values()) == sorted(arms["ours"]["peak_mib"].values()), "a peak never falls"


@pytest.mark.parametrize("what", ["rows", "groups", "parts", "tokens"])
def test_another_result_is_refused(speed: ModuleType, arms: dict[str, Any], what: str) -> None:
    other = copy.deepcopy(arms["plain"])
    other["results"][what] = "0" * 16
    with pytest.raises(ValueError, match="differ in results"):
        speed.check(arms["ours"], other)


def test_the_hash_of_an_outcome_sees_every_part_of_it(speed: ModuleType) -> None:
    same = {"loaded": 3, "kept": [("q", "a"), ("r", "b")], "groups": [0, 1], "parts": [0, 2], "tokens": [([1, 2], [-100, 2]), ([3], [3])]}
    first = speed.outcome(speed.Clock(), **same)["results"]
    assert speed.outcome(speed.Clock(), **copy.deepcopy(same))["results"] == first
    for name, other in {
        "kept": ("rows", [("q", "a"), ("r", "c")]),
        "groups": ("groups", [0, 0]),
        "parts": ("parts", [0, 1]),
        "tokens": ("tokens", [([1, 2], [-100, -100]), ([3], [3])]),
    }.items():
        changed = speed.outcome(speed.Clock(), **{**same, name: other[1]})["results"]
        assert {n for n in first if first[n] != changed[n]} == {other[0]}
    moved = speed.outcome(speed.Clock(), **{**same, "tokens": [([1, 2], [-100, 2, 3]), ([3], [])]})["results"]
    assert moved["tokens"] != first["tokens"], "a label has moved to the next row"


# ---- growth ---------------------------------------------------------------------------------------------------------


def test_copies_multiply_rows_and_groups(speed: ModuleType, few: Path, tmp_path: Path) -> None:
    from medquad_utils import cleaning, data

    speed.copies(few, 3, tmp_path)
    once, thrice = data.load_xml(few).rows, data.load_xml(tmp_path).rows
    assert len(thrice) == 3 * len(once)
    for column in ("question", "answer", "url", "document_id"):
        assert len({row[column] for row in thrice}) == 3 * len({row[column] for row in once}), column
    (kept, _), (kept_thrice, _) = cleaning.clean(once), cleaning.clean(thrice)
    assert len(kept_thrice) == pytest.approx(3 * len(kept), abs=3), "a mark may lift an answer over five words"
    without = [row for row in kept if row["focus"]]
    without_thrice = [row for row in kept_thrice if row["focus"]]
    assert len(set(data.groups(without_thrice))) == 3 * len(set(data.groups(without)))


def test_some_files_hold_as_many_answers_as_were_asked_for(speed: ModuleType, few: Path, tmp_path: Path) -> None:
    from medquad_utils import data

    speed.some(few, 100, tmp_path)
    names = {p.name for p in tmp_path.rglob("*.xml")}
    assert 100 <= len(data.load_xml(tmp_path).rows) < 140
    assert names < {p.name for p in few.rglob("*.xml")}
    speed.some(few, 150, tmp_path)
    assert names < {p.name for p in tmp_path.rglob("*.xml")}, "a larger sample holds the smaller one"


# ---- what is written ------------------------------------------------------------------------------------------------


def test_a_summary_is_the_median_of_ratios_round_by_round(speed: ModuleType) -> None:
    def arm(second: float, peak: float, leakage: bool) -> dict[str, Any]:
        stages = [*speed.STAGES, "start", *(["leakage"] if leakage else [])]
        return {"seconds": dict.fromkeys(stages, second), "peak_mib": dict.fromkeys(stages, peak)}

    rounds = [{"ours": arm(o, 10 * o, True), "plain": arm(p, p, False)} for o, p in ((1, 2), (2, 10), (4, 12))]
    made = speed.summary(rounds)
    assert made["seconds"]["clean"] == {"ours": [2, 1, 4], "plain": [10, 2, 12], "ratio": [3, 2, 5]}
    assert made["seconds"]["total"] == {"ours": [8, 4, 16], "plain": [40, 8, 48], "ratio": [3, 2, 5]}
    assert made["seconds"]["leakage"] == {"ours": [2, 1, 4]}
    assert made["peak_mib"] == {"ours": [20, 10, 40], "plain": [10, 2, 12], "ours, leakage too": [20, 10, 40]}
    assert speed.goals(made).count("reached") == 3
    assert speed.goals(made).count("not reached") == 0
    slower = speed.summary(rounds[:1])
    assert "at least 3 (2.00): **not reached**" in speed.goals(slower)


def test_the_json_holds_every_stage_of_every_round_and_says_where_it_was_measured(speed: ModuleType, measured: dict[str, Any]) -> None:
    assert measured["summary"] == speed.summary(measured["rounds"])
    assert len(measured["rounds"]) >= 1
    for made in measured["rounds"]:
        speed.check(made["ours"], made["plain"])
        assert set(made["ours"]["seconds"]) == {*speed.STAGES, *speed.APART}
        assert set(made["plain"]["seconds"]) == {*speed.STAGES, "start"}
    assert measured["counts"]["loaded"] == 16_407
    rows = [point["counts"]["loaded"] for point in measured["growth"]]
    assert rows[4:] == [16_407, 164_070]
    assert all(size <= n < size + 100 for size, n in zip(speed.SIZES, rows, strict=False))
    assert all(set(point["seconds"]) == {*speed.STAGES, *speed.APART} for point in measured["growth"])
    assert set(measured["machine"]) == {"cpus", "memory_gib", "system", "python", "packages"}, "no names"


def test_the_readme_says_what_the_json_says(speed: ModuleType, measured: dict[str, Any], tmp_path: Path) -> None:
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert speed.between(readme) == speed.tables(measured)
    copied = tmp_path / "README.md"
    copied.write_text(readme.replace("Measured on", "Guessed on"), encoding="utf-8")
    speed.write_readme(measured, copied)
    assert copied.read_text(encoding="utf-8") == readme


def test_the_figure_is_opaque_and_is_drawn_from_the_json(speed: ModuleType, measured: dict[str, Any], tmp_path: Path) -> None:
    from matplotlib.image import imread

    speed.draw(measured, tmp_path / "again.png")
    committed = imread(BENCHMARKS / "results" / "data_speed.png")
    again = imread(tmp_path / "again.png")
    assert committed.shape == again.shape
    assert abs(committed - again).mean() < 0.01
    assert committed.std() > 0.05, "the figure is blank"
    assert committed.shape[2] == 3 or committed[..., 3].min() == 1
