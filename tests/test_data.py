"""Sources, groups, split, leakage, specialties and the written of the data stage."""

from __future__ import annotations

import json
import random
import resource
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st

from medquad_utils import CourseError, data, files, splits
from medquad_utils.data import Loaded, Specialty
from medquad_utils.files import COLUMNS, REQUIRED, Row
from medquad_utils.profiles import Plan
from medquad_utils.splits import PARTS

# What a grouped split must not share.
SEALED = ("question", "normalised question", "focus", "answer but boilerplate")
BARE = dict.fromkeys(COLUMNS)


def row(question: str = "What causes Asthma ?", answer: str = "A b c d e.", **known: Any) -> Row:
    return BARE | {"qtype": "causes", "question": question, "answer": answer} | known


def diseases(count: int, **shared: Any) -> list[Row]:
    """Rows about ``count`` diseases that share only what is given."""
    own = [(f"What causes X{n} ?", f"Only X{n} has this cause.", f"X{n}") for n in range(count)]
    return [row(q, a, focus=focus) | shared for q, a, focus in own]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in rows]
        path.write_text("".join(lines), encoding="utf-8")
    else:
        write = pyarrow.csv.write_csv if path.suffix == ".csv" else pyarrow.parquet.write_table
        write(pyarrow.Table.from_pylist(rows), path)
    return path


ROWS = 16_407
QTYPES = {
    "information": 4535, "symptoms": 2748, "treatment": 2442, "inheritance": 1446,
    "frequency": 1120, "genetic changes": 1087, "causes": 727, "exams and tests": 653,
    "research": 395, "outlook": 361, "susceptibility": 324, "considerations": 235,
    "prevention": 210, "stages": 77, "complications": 46, "support groups": 1,
}  # fmt: skip


@pytest.mark.full
def test_real_xml_and_csv_hold_the_counted_rows(real_rows: list[Row], medquad_csv: Path) -> None:
    def texts(rows: list[Row]) -> Counter[tuple[str, ...]]:
        return Counter(tuple(" ".join(r[c].split()) for c in REQUIRED) for r in rows)

    assert len(real_rows) == ROWS
    assert len({r["source"] for r in real_rows}) == 9
    assert Counter(r["qtype"] for r in real_rows) == QTYPES
    assert sum(r["focus"] is None for r in real_rows) == 14
    from_csv = data.load_table(medquad_csv)
    assert (texts(from_csv.rows), from_csv.skipped) == (texts(real_rows), [])
    assert {tuple(r) for r in [*real_rows, *from_csv.rows]} == {COLUMNS}


@pytest.mark.full
def test_real_questions_follow_the_templates_and_form_small_groups(real_rows: list[Row]) -> None:
    found = [splits.template_of(r["question"]) for r in real_rows]
    assert sum(f is not None for f in found) / ROWS > 0.997
    assert len({f[0] for f in found if f}) == len(splits.TEMPLATES), "a template without a question"
    sizes = Counter(splits.groups(real_rows))
    assert 3700 <= len(sizes) <= 3850 and 100 <= max(sizes.values()) <= 160
    measured = splits.focus_recovery(real_rows)
    assert (measured["precision"], measured["found"] > 0.99) == (1, True)
    assert 0.2 < measured["leak"] < 0.4


@pytest.mark.full
def test_real_split_shares_no_disease(real_rows: Any, real_cleaned: Any, medquad_csv: Any) -> None:
    """Seed 0 and the chosen salt also give every large question type its share of each part."""
    for rows in (real_rows, real_cleaned[0], data.load_table(medquad_csv).rows):
        split = splits.split(rows)
        sizes = split.sizes().values()
        assert sum(sizes) == len(rows)
        assert [n / len(rows) for n in sizes] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
        report = splits.leakage_report(split)
        assert len(report.pop("boilerplate")) > 0
        for shares in report.values():
            assert {shares[name] for name in SEALED} == {0}
            assert 0 < shares["answer"] < 0.05
            assert rows is not real_rows or 0.2 < shares["8-gram"] < 0.4
        if any(r["url"] for r in rows):  # the salt was chosen for the columns of the XML
            large = [share for name, share in split.shares().items() if QTYPES[name] >= 70]
            assert [share["test"] for share in large] == pytest.approx([0.1] * 14, abs=0.03)
            assert [share["validation"] for share in large] == pytest.approx([0.1] * 14, abs=0.035)


@pytest.mark.full
def test_real_split_by_row_leaks_as_measured(real_rows: list[Row]) -> None:
    split = splits.split_by_row(real_rows)
    shares = splits.leakage(split.train + split.validation, split.test)
    for name, measured in {"focus": 0.858, "normalised question": 0.204, "question": 0.134}.items():
        assert shares[name] == pytest.approx(measured, abs=0.02)
    assert shares["answer"] > shares["answer but boilerplate"] > 0.005


DOCUMENT = """<?xml version="1.0" encoding="UTF-8"?>
<Document id="7" source="GARD" url="https://example.org/7"><Focus> Sjögren syndrome </Focus>
<UMLS><CUIs><CUI>C1</CUI><CUI>C2</CUI></CUIs><SemanticType>T047</SemanticType></UMLS>
<Synonyms><Synonym>SS</Synonym><Synonym> </Synonym></Synonyms>
<QAPairs><QAPair><Question qtype="causes">What causes Sjögren syndrome ?</Question>
<Answer> Nobody knows. </Answer></QAPair>
<QAPair><Question qtype="treatment">What to do ?</Question><Answer></Answer></QAPair>
<QAPair><Question></Question><Answer>An answer to nothing.</Answer></QAPair></QAPairs></Document>"""
BROKEN = {
    "cut.xml": DOCUMENT[:-40].encode(),
    "latin.xml": DOCUMENT.encode("latin-1"),
    "unknown.xml": b'<?xml version="1.0" encoding="klingon"?><Document/>',
    "japanese.xml": b'<?xml version="1.0" encoding="shift_jis"?><Document/>',
}


def test_xml_gives_rows_and_skips_broken_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "GARD").mkdir()
    for name, content in (BROKEN | {"good.xml": DOCUMENT.encode()}).items():
        (tmp_path / "GARD" / name).write_bytes(content)
    loaded = data.load(tiny(tmp_path, source="xml", data_path=str(tmp_path)))
    known = {
        "focus": "Sjögren syndrome", "synonyms": ["SS"], "cui": ["C1", "C2"], "source": "GARD",
        "semantic_type": ["T047"], "url": "https://example.org/7", "document_id": "7",
    }  # fmt: skip
    assert loaded.rows == [row("What causes Sjögren syndrome ?", "Nobody knows.", **known)]
    assert loaded.unanswered == 1
    skipped = [*(f"GARD/{name}" for name in BROKEN), "7: an answer without its question or qtype"]
    assert sorted(line.split(" (")[0] for line in loaded.skipped) == sorted(skipped)


line = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
cell = line.filter(str.strip)
record = st.fixed_dictionaries({"qtype": cell, "Question": cell, "Answer": cell})


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@given(rows=st.lists(record, min_size=1, max_size=5))
def test_tables_give_back_any_text(kind: str, tmp_path_factory: Any, rows: list[Any]) -> None:
    path = write_table(tmp_path_factory.getbasetemp() / f"any.{kind}", rows)
    expected = [BARE | {k.lower(): v.strip() for k, v in r.items()} for r in rows]
    assert data.load_table(path) == Loaded(expected)


def test_tables_keep_lists_and_ignore_a_byte_order_mark(tmp_path: Path) -> None:
    lists = {"synonyms": ["one", "two"], "cui": ["C1"], "semantic_type": ["T047"]}
    whole = row(focus="Asthma", source="a\u2028b", url="u", document_id="7", **lists)
    for kind in ("parquet", "jsonl"):
        assert data.load_table(write_table(tmp_path / f"rows.{kind}", [whole])).rows == [whole]
    flat = whole | {"synonyms": "one", "cui": "", "semantic_type": "T047"}
    path = write_table(tmp_path / "rows.csv", [flat])
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert data.load_table(path).rows == [whole | {"synonyms": ["one"], "cui": None}]


NAN = float("nan")
GOOD = {"qtype": "a", "question": "What causes A ?", "answer": "c"}
WRONG = [{"answer": None}, {"answer": 5}, {"answer": NAN}, {"question": ["b"]}, {"qtype": " "}]


def test_rows_that_are_not_text_are_skipped_and_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "rows.jsonl", [GOOD, *(GOOD | wrong for wrong in WRONG), GOOD])
    loaded = data.load_table(path)
    named = [f"row {n}: {next(iter(w))} is not text" for n, w in enumerate(WRONG, start=2)]
    assert (loaded.rows, loaded.skipped) == ([BARE | GOOD] * 2, named)
    assert "2 rows, 5 skipped: row 2: answer is not text; " in str(loaded)
    path = write_table(tmp_path / "a.parquet", [GOOD | {"focus": NAN, "cui": NAN, "url": 1.0}])
    assert data.load_table(path).rows == [BARE | GOOD], "NaN and numbers are unknown values"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,reply\na,b\n", "a.csv lacks the columns qtype, answer: it has"),
        ("a.csv", "qtype,question,answer\na,b,é\n".encode("latin-1"), "a.csv as csv.*UTF-8"),
        ("a.csv", b'qtype,question,answer\na,"b,c\n', "a.csv as csv: unexpected end of data"),
        ("a.csv", b"qtype,question,answer\n", "a.csv.* holds no question with an answer"),
        ("a.jsonl", b'{"qtype": "a", "q', r"cannot read a\.jsonl as jsonl"),
        ("a.jsonl", b'[{"qtype": "a"}]', r"a.jsonl.*a line is not an object: \[{'qtype': 'a'}\]"),
        ("a.parquet", b"PAR1" + bytes(99) + b"2\0\0\0PAR1", r"cannot read a\.parquet"),
        ("a.xlsx", b"PK", r"the ending '\.xlsx' is none of \.csv, \.jsonl, \.parquet"),
        ("no.csv", b"", "no file .*no.csv.*with the columns qtype, question, answer"),
        ("no.xml", b"", r"no XML files .*git clone https://github\.com/abachaa/MedQuAD"),
        ("no.hub", b"", "git clone .*source=xml.*source=sample"),
    ],
)
def test_unusable_source_is_refused(name: str, content: bytes, message: str, tmp_path: Any) -> None:
    path, source = tmp_path / name, name.split(".")[1].replace("xlsx", "csv")
    if content:
        path.write_bytes(content)
    with pytest.raises(CourseError, match=message):
        data.load(tiny(tmp_path, source=source, data_path=str(path)))


def test_the_hub_is_read_from_its_file_at_a_fixed_commit(tmp_path: Path, monkeypatch: Any) -> None:
    def download(name: str, file: str, repo_type: str, revision: str) -> str:
        assert (repo_type, len(revision), file[-4:]) == ("dataset", 40, ".csv")
        return str(
            write_table(tmp_path / file, [{"qtype": "a", "Question": "b ?", "Answer": name}])
        )

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    (only,) = data.load(tiny(tmp_path, source="hub")).rows
    assert (only["question"], only["answer"]) == ("b ?", data.HUB_DATASET)


def some_rows(seed: int, count: int) -> list[Row]:
    """Rows in which foci, questions, answers, URLs and concepts are shared now and then."""
    rng = random.Random(seed)
    forms = ("What causes {} ?", "How to prevent {} ?", "tell of {}", "Tell of {}!")
    rows = []
    for _ in range(count):
        focus, other, answer, url, cui = (f"X{rng.randrange(150)}" for _ in range(5))
        known = {"focus": rng.choice([focus, focus.lower() + "!", None])}
        known |= {"url": rng.choice([None, url]), "cui": rng.choice([None, [cui], [cui, "C1"]])}
        question = rng.choice(forms).format(rng.choice([focus, other]))
        rows.append(row(question, rng.choice([answer, answer, "the same"]), **known))
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_groups_are_the_closure_of_what_two_rows_share(seed: int) -> None:
    rows = some_rows(seed, seed + 1)
    foci = [splits.focus_of(r) for r in rows]
    most = {"cui": 5, "answer": 10}
    wide = [{("answer", r["answer"]), *(("cui", c) for c in r["cui"] or ())} for r in rows]

    def joins(key: tuple[str, str]) -> bool:
        return len({f for f, mine in zip(foci, wide, strict=True) if key in mine}) <= most[key[0]]

    keys = []
    for number, (r, mine) in enumerate(zip(rows, wide, strict=True)):
        own = {foci[number], ("?", splits.normalise(r["question"])), ("url", r["url"] or number)}
        keys.append(own | set(filter(joins, mine)))
    reach = [{b for b, other in enumerate(keys) if key & other} for key in keys]
    for _ in rows:
        reach = [set().union(*(reach[b] for b in mine)) for mine in reach]
    numbers = splits.groups(rows)
    assert [{b for b, n in enumerate(numbers) if n == mine} for mine in numbers] == reach


def test_rare_concept_or_answer_joins_diseases_and_a_common_one_does_not() -> None:
    for shared, most in (({"cui": ["C1"]}, 5), ({"answer": "the same words"}, 10)):
        assert len(set(splits.groups(diseases(most, **shared)))) == 1
        assert len(set(splits.groups(diseases(most + 1, **shared)))) == most + 1
    assert len(set(splits.groups(diseases(99, url="u")))) == 1
    nameless = [row(f"tell me about {n}", f"Answer {n}.") for n in range(3)]
    assert splits.groups([*nameless, *diseases(2)]) == [0, 0, 0, 1, 2], "rows without a focus"
    rows = [*diseases(11, answer="11"), *diseases(10, answer="10"), *diseases(12, answer="12")]
    assert list(splits.boilerplate(rows).items()) == [("12", 12), ("11", 11)]


@pytest.mark.parametrize("seed", range(40))
def test_grouped_split_keeps_rows_and_leaks_only_boilerplate(seed: int) -> None:
    rows = some_rows(seed, 60)
    split = splits.split(rows, (0.5, 0.25, 0.25), seed)
    parts = (split.train, split.validation, split.test)
    everything = [r for part in parts for r in part]
    assert sorted(map(repr, everything)) == sorted(map(repr, rows))
    report = splits.leakage_report(split)
    assert [b["answer"] for b in report.pop("boilerplate")] == list(splits.boilerplate(everything))
    assert {shares[name] for shares in report.values() for name in SEALED} == {0}
    for a, b in combinations(parts, 2):
        assert not {r["url"] for r in a} & {r["url"] for r in b} - {None}


@pytest.mark.parametrize("seed", range(3))
def test_adding_or_reordering_diseases_moves_no_row(seed: int) -> None:
    old = [row(f"What causes Old {n} ?", f"answer {n}", url=f"u/{n // 2}") for n in range(300)]

    def where(rows: list[Row], seed: int = seed) -> list[str]:
        part = {id(r): n for n in PARTS for r in getattr(splits.split(rows, seed=seed), n)}
        return [part[id(r)] for r in old]

    assert where(old) == where([*diseases(60), *old]) == where(old[::-1])
    assert where(old) != where(old, seed + 1)


@pytest.mark.parametrize("split", [splits.split, splits.split_by_row])
def test_fractions_are_kept_and_must_add_up_to_one(split: Any) -> None:
    sizes = split(diseases(3000), (0.5, 0.3, 0.2)).sizes().values()
    assert [n / 3000 for n in sizes] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    for wrong in ((0.8, 0.1, 0.2), (1, 0, 0), (1.2, -0.1, -0.1), (NAN, 0.5, 0.5)):
        with pytest.raises(CourseError, match=r"be positive and add up to 1, for example \(0\.8"):
            split(diseases(100), wrong)


def test_group_larger_than_the_test_part_stays_in_training() -> None:
    large = [row(f"How to prevent Gout {n} ?", f"Gout {n}.", focus="Gout") for n in range(41)]
    rows = [*diseases(359), *large]
    note = "group 'gout' (41 rows) is larger than a part of 40: kept in training"
    for seed in range(5):
        split = splits.split(rows, seed=seed)
        assert [r for r in split.train if r["focus"] == "Gout"] == large
        assert split.notes == [note]
    assert splits.split(rows[:-1] + diseases(1, focus="One more")).notes == []


def test_too_few_groups_are_refused_and_a_column_focus_helps() -> None:
    questions = [row(f"why is thing {n} so?", f"Because of reason {n}.") for n in range(40)]
    for rows in ([row(focus="Asthma")] * 40, questions, []):
        with pytest.raises(CourseError, match=f"^{len(rows)} rows in . groups .*a column focus"):
            splits.split(rows)
    named = [r | {"focus": f"Thing {n}"} for n, r in enumerate(questions)]
    assert sum(splits.split(named).sizes().values()) == 40


def test_leakage_is_the_share_of_test_rows_that_training_knows() -> None:
    train = [row("What causes Gout ?", "A", focus="Gout"), row("what causes flu?", "B", focus="F")]
    test = [row("What causes Gout ?", "C", focus="Gout"), row("Is Gout bad ?", "D", focus="gout")]
    test += [row("What causes FLU ?", "B", focus="Influenza"), row("tell me", "E")]
    shares = splits.leakage([*train, row("tell me more", "F")], test)
    assert list(shares) == [*SEALED[:3], "answer", SEALED[3], "8-gram"]
    assert list(shares.values()) == [0.25, 0.5, 0.5, 0.25, 0.25, 0], "no focus, none shared"
    same = diseases(11, answer="the same")
    shares = splits.leakage(same[:10], [same[10], row("Why ?", "another")])
    assert (shares["answer"], shares["answer but boilerplate"]) == (0.5, 0)
    eight = [row(answer="One two three four five six seven eight")]
    more = [row(answer="one, TWO three: four five six seven eight! Nine")]
    halves = [row(answer="one two three four"), row(answer="five six seven eight")]
    assert splits.leakage(eight, more)["8-gram"] == 0.5
    assert splits.leakage(halves, eight)["8-gram"] == splits.leakage(eight, halves)["8-gram"] == 0


def test_specialty_finds_rows_by_focus_synonym_or_semantic_type() -> None:
    hearts = [row(focus="Heart failure"), row("What causes Angina ?")]
    hearts.append(row(focus="Holt-Oram syndrome", synonyms=["HOS", "Heart-hand syndrome"]))
    others = [row(focus=name) for name in ("Gout", "Heartburn", "Sweetheart disease")]
    growth = row(focus="Odd growth", semantic_type=["T047", "T191"])
    rows = [*hearts, *others, growth]
    assert data.select(rows, "cardiology", least=1) == hearts
    assert data.select(rows, "oncology", least=1) == [growth]
    assert data.select(rows, Specialty("gout", ("T047",)), least=1) == [others[0], growth]
    for wrong, message in (("heart", "there are cardiology"), ("cardiology", "3 rows .* too few")):
        with pytest.raises(CourseError, match=message):
            data.select(rows, wrong)
    with pytest.raises(CourseError, match=r"Specialty\(names='heart\('\) is no pattern"):
        Specialty("heart(")


def test_disk_that_fills_up_loses_neither_json_nor_rows(tmp_path: Path) -> None:
    written: dict[str, Any] = {"value.json": files.write_json, "rows.parquet": files.write_rows}
    for name, write in written.items():
        write(tmp_path / name, [row()])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # byte 2,001 of a file fails
    try:
        for name, write in written.items():
            with pytest.raises(CourseError, match=f"cannot write {name}: .*Free some space"):
                write(tmp_path / name, [row(answer=f"{n} " * 99) for n in range(5000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_torn_or_missing_parquet_says_how_to_make_it_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    files.write_rows(path, [row(answer=f"answer {n}") for n in range(100)])
    path.write_bytes(path.read_bytes()[:-100])
    for name in ("rows.parquet", "none.parquet"):
        with pytest.raises(CourseError, match=rf"cannot read {name}.*run lesson 01 again"):
            files.read_rows(tmp_path / name)


def own_rows(out: Path, end: str = "") -> Plan:
    """The plan for a file of one's own with 60 diseases; ``end`` is added to each answer."""
    rows = [r | {"answer": r["answer"] + end} for r in diseases(60)]
    return tiny(out, source="jsonl", data_path=str(write_table(out / "mine.jsonl", rows)))


def test_prepare_writes_once_and_reads_back_the_same(tmp_path: Path) -> None:
    plan = tiny(tmp_path)
    made = data.prepare(plan)
    folder = plan.folder / "data"
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert set(times) == {*(f"{name}.parquet" for name in PARTS), "leakage.json", "data.json"}
    assert data.prepare(plan) == made
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times
    (folder / "test.parquet").unlink()
    assert data.prepare(plan) == made, "a part that was deleted is made again"
    part, _ = data.make(plan, folder, specialty="infectious diseases")
    assert sum(part.sizes().values()) < sum(made.sizes().values())
    assert data.prepare(plan) == made, "a specialty is not taken for the whole"


def test_prepare_starts_again_for_another_seed_source_or_rule(tmp_path: Path) -> None:
    plan = own_rows(tmp_path)
    first = data.prepare(plan)
    assert data.prepare(replace(plan, seed=1)).train != first.train
    assert "white space" not in data.make(plan, plan.folder / "data", ["white space"])[0].cleaning
    assert data.prepare(plan) == first
    assert data.prepare(own_rows(tmp_path, " Really.")).train != first.train


def test_interrupted_prepare_never_mixes_two_seeds(tmp_path: Path, monkeypatch: Any) -> None:
    plan = own_rows(tmp_path)
    made = data.prepare(plan)
    real, calls = pyarrow.parquet.write_table, iter(range(9))

    def interrupted(*args: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pyarrow.parquet, "write_table", interrupted)
        data.prepare(replace(plan, seed=1))
    assert data.prepare(plan) == made


def test_draw_takes_the_same_rows_in_the_same_order_for_a_seed() -> None:
    rows = diseases(200)
    drawn = splits.draw(rows, 20, seed=1)
    assert len({r["question"] for r in drawn}) == len(drawn) == 20
    assert drawn == splits.draw(rows[::-1], 20, seed=1) == splits.draw(rows, 0, seed=1)[:20]
    assert drawn != splits.draw(rows, 20, seed=2)
    even = [r for r in splits.draw(rows, 0, seed=1) if int(r["focus"][1:]) % 2 == 0]
    assert splits.draw(rows, 20, seed=1, fits=even.__contains__) == even[:20]
