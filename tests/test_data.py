"""Sources, groups, splits, what leaks between them, sub-corpora, and the files of the data stage."""

from __future__ import annotations

import csv
import json
import random
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medquad_utils import data
from medquad_utils.cleaning import Effect, clean
from medquad_utils.data import COLUMNS, LISTS, PARTS, REQUIRED, Loaded, Row, Specialty, Splits
from medquad_utils.profiles import CourseError, Hardware, Plan, resolve

LAPTOP = Hardware("cpu", "a CPU", 8.0)


def plan_for(out: Path, source: str = "sample", data_path: str | Path = "", seed: int = 0) -> Plan:
    return resolve("tiny", hardware=LAPTOP, source=source, data_path=str(data_path), seed=seed, out=str(out))


def row(question: str = "What causes Asthma ?", answer: str = "One two three four five.", **known: Any) -> Row:
    return {**dict.fromkeys(COLUMNS), "qtype": "causes", "question": question, "answer": answer, **known}


# ---- the real data --------------------------------------------------------------------------------------------------

ROWS = 16_407
SOURCES = {
    "GHR": 5430, "GARD": 5389, "NIDDK": 1192, "NINDS": 1088, "MPlusHealthTopics": 981, "NIHSeniorHealth": 769,
    "CancerGov": 729, "NHLBI": 559, "CDC": 270,
}  # fmt: skip
QTYPES = {
    "information": 4535, "symptoms": 2748, "treatment": 2442, "inheritance": 1446, "frequency": 1120, "genetic changes": 1087,
    "causes": 727, "exams and tests": 653, "research": 395, "outlook": 361, "susceptibility": 324, "considerations": 235,
    "prevention": 210, "stages": 77, "complications": 46, "support groups": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def from_csv(medquad_csv: Path) -> Loaded:
    return data.load_table(medquad_csv)


@pytest.fixture(scope="module")
def real_split(real_rows: list[Row]) -> Splits:
    return data.split(real_rows)


@pytest.fixture(scope="module")
def random_split(real_rows: list[Row]) -> Splits:
    return data.split_by_row(real_rows)


def part_of(parts: Splits) -> dict[int, str]:
    """The part of each row, by the identity of the row."""
    return {id(r): name for name in PARTS for r in getattr(parts, name)}


def moved(rows: list[Row], before: Splits, after: Splits) -> float:
    """Share of ``rows`` that stand in another part."""
    old, new = part_of(before), part_of(after)
    return sum(old[id(r)] != new[id(r)] for r in rows) / len(rows)


def test_the_xml_holds_what_was_counted_in_it(real_rows: list[Row]) -> None:
    assert len(real_rows) == ROWS
    assert Counter(r["source"] for r in real_rows) == SOURCES
    assert Counter(r["qtype"] for r in real_rows) == QTYPES
    assert sum(r["focus"] is None for r in real_rows) == 14


def test_the_csv_holds_the_same_rows_as_the_xml(real_rows: list[Row], from_csv: Loaded) -> None:
    def texts(rows: list[Row]) -> Counter[tuple[str, ...]]:
        return Counter(tuple(" ".join(r[c].split()) for c in REQUIRED) for r in rows)

    assert (len(from_csv.rows), from_csv.skipped) == (ROWS, [])
    assert texts(real_rows) == texts(from_csv.rows)


def test_every_source_is_brought_to_one_schema_with_null_for_what_it_lacks(real_rows: list[Row], from_csv: Loaded, tmp_path: Path) -> None:
    sample = data.load(plan_for(tmp_path)).rows
    for rows, lacks in ((real_rows, set()), (from_csv.rows, set(COLUMNS) - set(REQUIRED)), (sample, {"cui", "url"})):
        for r in rows:
            assert tuple(r) == COLUMNS
            assert all(isinstance(r[c], str) and r[c] == r[c].strip() != "" for c in REQUIRED)
            for c in set(COLUMNS) - set(REQUIRED):
                values = r[c] if c in LISTS and r[c] is not None else [r[c]]
                assert values == [None] or all(isinstance(x, str) and x for x in values), (c, r[c])
        never = {c for c in COLUMNS if all(r[c] is None for r in rows)}
        assert never == lacks


def test_the_templates_cover_nearly_all_real_questions(real_rows: list[Row]) -> None:
    found = [(data.template_of(r["question"]), r["focus"]) for r in real_rows]
    assert sum(f is not None for f, _ in found) / ROWS > 0.997
    assert len({f[0] for f, _ in found if f}) == len(data.TEMPLATES), "a template that no question follows"
    assert [focus for f, focus in found if f and focus and data.normalise(f[1]) != data.normalise(focus)] == []


def test_real_groups_are_many_and_none_is_large(real_rows: list[Row]) -> None:
    numbers = data.groups(real_rows)
    sizes = Counter(numbers)
    assert 3700 <= len(sizes) <= 3850
    assert 100 <= max(sizes.values()) <= 160
    assert len({number for number, r in zip(numbers, real_rows, strict=True) if not data.focus_of(r)}) == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_grouped_split_of_the_real_data_shares_no_focus_question_or_url(real_rows: list[Row], from_csv: Loaded, seed: int) -> None:
    keys = (data.focus_of, lambda r: r["question"], lambda r: data.normalise(r["question"]), lambda r: r["url"])
    for rows in (real_rows, from_csv.rows):
        parts = data.split(rows, seed=seed)
        sizes = parts.sizes()
        assert sum(sizes.values()) == ROWS
        assert [abs(n / ROWS - want) < 0.02 for n, want in zip(sizes.values(), (0.8, 0.1, 0.1), strict=True)] == [True] * 3
        assert parts.notes == []
        for key in keys:
            sides = [{key(r) for r in getattr(parts, name)} - {None} for name in PARTS]
            assert [a & b for a, b in combinations(sides, 2)] == [set()] * 3


def test_what_leaks_from_a_grouped_split_of_the_real_data_is_boilerplate_and_listed(real_rows: list[Row], real_split: Splits) -> None:
    report = data.leakage_report(real_split)
    listed = report.pop("boilerplate")
    assert set(report) == {"train / validation", "train / test", "validation / test"}
    for shares in report.values():
        assert {shares[name] for name in ("question", "normalised question", "focus", "answer but boilerplate")} == {0}
        assert 0 < shares["answer"] < 0.05
        assert 0.2 < shares["8-gram"] < 0.4
    assert [b["foci"] for b in listed] == sorted((b["foci"] for b in listed), reverse=True)
    assert [b["answer"][:54] for b in listed[:2]] == [
        "This condition is inherited in an autosomal recessive ", "This condition is inherited in an autosomal dominant p",
    ]  # fmt: skip
    foci: dict[str, set[str]] = {}
    for r in real_rows:
        foci.setdefault(r["answer"], set()).add(data.focus_of(r))
    assert {b["answer"]: b["foci"] for b in listed} == {answer: len(names) for answer, names in foci.items() if len(names) > 10}
    for b in listed:
        assert b["rows"] == {name: sum(r["answer"] == b["answer"] for r in getattr(real_split, name)) for name in PARTS}


def test_nothing_leaks_from_the_cleaned_real_data_either(real_cleaned: tuple[list[Row], dict[str, Effect]]) -> None:
    parts = data.split(real_cleaned[0])
    common = data.boilerplate(real_cleaned[0])
    assert 0 < len(common) < 10
    for a, b in combinations(PARTS, 2):
        shares = data._shared_rows(getattr(parts, a), getattr(parts, b), common)
        assert shares.pop("answer") > 0
        assert set(shares.values()) == {0}


def test_a_random_split_of_the_real_data_leaks_as_measured(random_split: Splits) -> None:
    assert sum(random_split.sizes().values()) == ROWS
    shares = data.leakage(random_split.train + random_split.validation, random_split.test)
    for name, measured in {"focus": 0.858, "normalised question": 0.204, "question": 0.134}.items():
        assert shares[name] == pytest.approx(measured, abs=0.02)
    assert shares["answer"] > shares["answer but boilerplate"] > 0.005


def test_every_question_type_of_the_real_data_has_its_share_of_the_test_part(
    real_split: Splits, real_cleaned: tuple[list[Row], dict[str, Effect]]
) -> None:
    """With the seed that is set and the salt that was chosen for it."""
    for parts in (real_split, data.split(real_cleaned[0])):
        shares = parts.shares()
        assert set(shares) == set(QTYPES)
        for qtype, share in shares.items():
            assert sum(share.values()) == pytest.approx(1)
            if QTYPES[qtype] >= 70:
                assert share["test"] == pytest.approx(0.1, abs=0.03)
                assert share["validation"] == pytest.approx(0.1, abs=0.035)
            if QTYPES[qtype] >= 300:
                assert share["test"] == pytest.approx(0.1, abs=0.02)


def test_rows_about_new_diseases_move_no_real_row(real_rows: list[Row], real_split: Splits) -> None:
    new = [
        row(f"What causes Novelty {n} ?", f"The cause of novelty {n} is not known.", focus=f"Novelty {n}", url=f"new/{n}", cui=[f"N{n}"])
        for n in range(1000)
    ]
    assert moved(real_rows, real_split, data.split([*new, *real_rows])) == 0


@pytest.mark.parametrize(("kept", "most"), [(0.9, 0.02), (0.5, 0.06)])
def test_rows_that_go_move_few_of_the_real_rows_that_stay(real_rows: list[Row], real_split: Splits, kept: float, most: float) -> None:
    """Only a group that falls apart, or loses the row that names it, may move."""
    rng = random.Random(0)
    rest = [r for r in real_rows if rng.random() < kept]
    assert moved(rest, real_split, data.split(rest)) < most


def test_the_focus_is_recovered_from_the_questions_and_what_that_loses_is_measured(real_rows: list[Row]) -> None:
    measured = data.focus_recovery(real_rows)
    assert measured["precision"] == 1.0
    assert measured["found"] > 0.99
    assert 0.2 < measured["leak"] < 0.4


def test_each_specialty_finds_its_rows_in_the_real_data(real_rows: list[Row]) -> None:
    sizes = {name: len(data.select(real_rows, name, least=200)) for name in data.SPECIALTIES}
    assert len(sizes) >= 11
    assert max(sizes.values()) < 2500
    chosen = data.select(real_rows, "cardiology")
    assert 850 <= len(chosen) <= 1000
    assert 190 <= len({data.focus_of(r) for r in chosen}) <= 240
    names = {data.focus_of(r) for r in chosen}
    assert {"heart failure", "angina", "long qt syndrome", "stroke", "holt oram syndrome"} <= names, "the last by a synonym"
    assert not {"asthma", "heartburn", "gout", "eczema"} & names
    by_focus = data.select([{**r, "synonyms": None} for r in real_rows], "cardiology")
    assert 600 <= len(by_focus) <= 680
    assert 120 <= len({data.focus_of(r) for r in by_focus}) <= 145


# ---- XML ------------------------------------------------------------------------------------------------------------

DOCUMENT = """<?xml version="1.0" encoding="UTF-8"?>
<Document id="7" source="GARD" url="https://example.org/7">
<Focus> Sjögren syndrome </Focus>
<FocusAnnotations><UMLS><CUIs><CUI>C1</CUI><CUI>C2</CUI></CUIs><SemanticTypes><SemanticType>T047</SemanticType></SemanticTypes></UMLS>
<Synonyms><Synonym>SS</Synonym><Synonym> </Synonym></Synonyms></FocusAnnotations>
<QAPairs>
<QAPair pid="1"><Question qid="7-1" qtype="causes">What causes Sjögren syndrome ?</Question><Answer> Nobody knows. </Answer></QAPair>
<QAPair pid="2"><Question qid="7-2" qtype="treatment">What are the treatments for it ?</Question><Answer></Answer></QAPair>
<QAPair pid="3"><Question qid="7-3"></Question><Answer>An answer to nothing.</Answer></QAPair>
</QAPairs></Document>"""


def test_an_xml_document_becomes_rows_of_the_schema(tmp_path: Path) -> None:
    (tmp_path / "7.xml").write_text(DOCUMENT, encoding="utf-8")
    loaded = data.load_xml(tmp_path)
    assert loaded.rows == [
        {
            "qtype": "causes", "question": "What causes Sjögren syndrome ?", "answer": "Nobody knows.", "focus": "Sjögren syndrome",
            "synonyms": ["SS"], "cui": ["C1", "C2"], "semantic_type": ["T047"], "source": "GARD", "url": "https://example.org/7",
            "document_id": "7",
        }
    ]  # fmt: skip
    assert loaded.unanswered == 1
    assert len(loaded.skipped) == 1 and loaded.skipped[0].startswith("7: ")


BROKEN = {
    "cut.xml": DOCUMENT[:-40].encode(),
    "empty.xml": b"",
    "binary.xml": bytes(range(256)),
    "latin.xml": '<?xml version="1.0" encoding="UTF-8"?><Document>é</Document>'.encode("latin-1"),
    "entity.xml": b"<Document>&nbsp;</Document>",
    "unknown.xml": b'<?xml version="1.0" encoding="klingon"?><Document/>',
    "japanese.xml": b'<?xml version="1.0" encoding="shift_jis"?><Document/>',
}


def test_broken_xml_among_good_files_is_skipped_counted_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "1_GARD_QA"
    folder.mkdir()
    for name, content in BROKEN.items():
        (folder / name).write_bytes(content)
    (folder / "folder.xml").mkdir()
    good = DOCUMENT.replace('<QAPair pid="3">', "<QAPair><!-- -->").replace("An answer to nothing.", "")
    for name in ("a.xml", "z.xml"):
        (folder / name).write_text(good, encoding="utf-8")
    plan = plan_for(tmp_path, "xml", tmp_path)
    loaded = data.load(plan)
    assert len(loaded.rows) == 2
    assert sorted(line.split(" (")[0] for line in loaded.skipped) == sorted(f"1_GARD_QA/{name}" for name in (*BROKEN, "folder.xml"))
    assert f"{len(BROKEN) + 1} skipped: 1_GARD_QA/" in str(loaded)


def test_a_folder_without_xml_says_where_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "notes.txt"):
        with pytest.raises(CourseError, match=r"git clone https://github\.com/abachaa/MedQuAD"):
            data.load(plan_for(tmp_path, "xml", folder))


def test_xml_without_any_answer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1.xml").write_text(DOCUMENT.replace("Nobody knows.", "").replace("An answer to nothing.", ""), encoding="utf-8")
    with pytest.raises(CourseError, match=r"holds no question with an answer.*3 questions without an answer"):
        data.load(plan_for(tmp_path, "xml", tmp_path))


# ---- tables ---------------------------------------------------------------------------------------------------------

line = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(lambda text: text.strip())
records = st.lists(st.fixed_dictionaries({"qtype": line, "Question": line, "Answer": line}), min_size=1, max_size=5)


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@given(rows=records)
def test_whatever_text_a_table_holds_is_read_back(kind: str, tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = write_table(tmp_path_factory.mktemp("table") / f"rows.{kind}", rows)
    loaded = data.load_table(path)
    assert loaded.skipped == []
    assert loaded.rows == [{**dict.fromkeys(COLUMNS), **{k.lower(): v.strip() for k, v in r.items()}} for r in rows]
    shutil.rmtree(path.parent)


def test_a_byte_order_mark_does_not_hide_the_first_column(tmp_path: Path) -> None:
    for name, text in {"a.csv": "qtype,question,answer\na,b,c\n", "a.jsonl": '{"qtype": "a", "question": "b", "answer": "c"}\n'}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert data.load_table(tmp_path / name).rows == [row("b", "c", qtype="a")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wrong.csv", b"question,reply\na,b\n", r"lacks the columns qtype, answer: it has question, reply"),
        ("semicolons.csv", b"qtype;question;answer\na;b;c\n", "lacks the columns qtype, question, answer"),
        ("wrong.jsonl", b'{"qtype": "a"}\n', "lacks the columns question, answer"),
        ("latin.csv", "qtype,question,answer\na,b,Sjögren\n".encode("latin-1"), r"cannot read latin\.csv as csv.*UTF-8"),
        ("sixteen.csv", "qtype,question,answer\n".encode("utf-16"), r"cannot read sixteen\.csv"),
        ("broken.jsonl", b'{"qtype": "a", "question": ', r"cannot read broken\.jsonl as jsonl"),
        ("list.jsonl", b"[1, 2]\n", "line 1 is not an object"),
        ("garbage.parquet", b"not parquet at all", r"cannot read garbage\.parquet"),
        ("footer.parquet", b"PAR1" + bytes(100) + (50).to_bytes(4, "little") + b"PAR1", r"cannot read footer\.parquet"),
        ("table.xlsx", b"PK", r"the ending '\.xlsx' is none of \.csv, \.jsonl, \.parquet"),
        ("empty.csv", b"", "holds no question with an answer"),
        ("header.csv", b"qtype,question,answer\n", "holds no question with an answer"),
        ("empty.jsonl", b"\n\n", "holds no question with an answer"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CourseError, match=message) as caught:
        data.load(plan_for(tmp_path, "csv", tmp_path / name))
    assert name in str(caught.value)


def test_a_parquet_file_damaged_in_the_middle_is_refused(tmp_path: Path) -> None:
    rows = [{"qtype": "a", "question": f"q{i}", "answer": "x" * i} for i in range(2000)]
    path = write_table(tmp_path / "rows.parquet", rows)
    content = path.read_bytes()
    path.write_bytes(content[:300] + bytes(200) + content[500:])
    with pytest.raises(CourseError, match=r"cannot read rows\.parquet"):
        data.load_table(path)


def test_a_missing_file_names_the_columns_that_are_wanted(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(CourseError, match="with the columns qtype, question, answer"):
            data.load(plan_for(tmp_path, "csv", path))


def test_rows_that_are_not_text_are_skipped_counted_and_named(tmp_path: Path) -> None:
    good = {"qtype": "a", "question": "b", "answer": "c"}
    bad = [{**good, "answer": None}, {**good, "answer": 5}, {**good, "question": ["b"]}, {**good, "qtype": " "}, {"qtype": "a"}]
    loaded = data.load_table(write_table(tmp_path / "rows.jsonl", [good, *bad, good]))
    assert len(loaded.rows) == 2
    assert loaded.skipped == [
        "row 2: answer is not text", "row 3: answer is not text", "row 4: question is not text", "row 5: qtype is not text",
        "row 6: question is not text",
    ]  # fmt: skip
    assert "2 rows, 5 skipped: row 2: answer is not text; " in str(loaded)
    short = tmp_path / "short.csv"
    short.write_text("qtype,question,answer\na,b,c,more,and more\na,b\n\na,b,c\n")
    assert (len(data.load_table(short).rows), data.load_table(short).skipped) == (2, ["row 2: answer is not text"])


def test_nan_in_parquet_is_no_text_and_no_known_value(tmp_path: Path) -> None:
    nan = float("nan")
    table = {"qtype": ["a", "b"], "question": ["What causes A ?", "What causes B ?"], "answer": [nan, nan], "focus": [nan, nan]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "all.parquet")
    assert data.load_table(tmp_path / "all.parquet").skipped == ["row 1: answer is not text", "row 2: answer is not text"]
    known = {**table, "answer": ["one two three four five", "six seven eight nine ten"], "cui": [nan, nan], "url": [1, 2]}
    pyarrow.parquet.write_table(pyarrow.table(known), tmp_path / "some.parquet")
    loaded = data.load_table(tmp_path / "some.parquet")
    assert [(r["focus"], r["cui"], r["url"]) for r in loaded.rows] == [(None, None, None)] * 2
    data.write_rows(tmp_path / "out.parquet", clean(loaded.rows)[0])
    assert data.read_rows(tmp_path / "out.parquet") == loaded.rows
    assert data.groups(loaded.rows) == [0, 1]


def test_a_table_of_the_common_schema_keeps_its_lists(tmp_path: Path) -> None:
    whole = row(focus="Asthma", synonyms=["one", "two"], cui=["C1"], semantic_type=["T047"], source="GARD", url="u", document_id="7")
    for kind in ("parquet", "jsonl"):
        assert data.load_table(write_table(tmp_path / f"rows.{kind}", [whole])).rows == [whole]
    in_csv = data.load_table(write_table(tmp_path / "rows.csv", [{**whole, "synonyms": "one", "cui": "", "semantic_type": "T047"}]))
    assert in_csv.rows == [{**whole, "synonyms": ["one"], "cui": None, "semantic_type": ["T047"]}]


def test_the_hub_out_of_reach_names_the_ways_without_it(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match=r"git clone .*source=xml.*source=sample"):
        data.load(plan_for(tmp_path, "hub"))


# ---- groups and splits ----------------------------------------------------------------------------------------------

foci = st.sampled_from([None, "", "Asthma", "asthma!", "Gout", "Flu", "Lupus", "Measles", "Mumps", "Acne"])
texts = st.sampled_from([f"{letter} {'word ' * n}" for letter in "abc" for n in (1, 60)]) | st.integers(0, 99).map("answer {}".format)


@st.composite
def made_up_rows(draw: st.DrawFn) -> list[Row]:
    """Rows in which foci, URLs, concepts and answers are shared in every way; some lack a focus, some follow no template."""
    rows = []
    for number in range(draw(st.integers(1, 25))):
        other = draw(st.sampled_from(["Asthma", "Gout", "Cough", f"Disease {number}"]))
        focus = draw(foci | st.just(f"Disease {number}"))
        question = draw(st.sampled_from(["What causes {} ?", "What is (are) {} ?", "How to prevent {} ?"])).format(focus or other)
        question = draw(st.sampled_from([question, question, f"tell me about {other}", f"Tell me about {other}!"]))
        url = draw(st.none() | st.sampled_from(["u1", "u2", "u3"]) | st.just(f"own {number}"))
        cui = draw(st.none() | st.lists(st.sampled_from(["C1", "C2", "C3", "C4"]), max_size=2))
        rows.append(row(question, draw(texts), focus=focus or None, url=url, cui=cui))
    return rows


def joined_by_hand(rows: list[Row]) -> list[set[int]]:
    """For each row the rows of its group: pairs by the definition, then the transitive closure, without union-find."""
    names = [data.focus_of(r) for r in rows]

    def foci_with(column: str, value: str) -> int:
        values = [r[column] if column == "cui" else [r[column]] for r in rows]
        return len({name for name, mine in zip(names, values, strict=True) if value in (mine or ())})

    def linked(a: int, b: int) -> bool:
        one, two = rows[a], rows[b]
        rare = [c for c in set(one["cui"] or ()) & set(two["cui"] or ()) if foci_with("cui", c) <= 5]
        same_answer = one["answer"] == two["answer"] and foci_with("answer", one["answer"]) <= 10
        same_question = data.normalise(one["question"]) == data.normalise(two["question"])
        same_url = one["url"] is not None and one["url"] == two["url"]
        return names[a] == names[b] or same_question or same_url or same_answer or bool(rare)

    reach = [{b for b in range(len(rows)) if a == b or linked(a, b)} for a in range(len(rows))]
    for _ in rows:
        reach = [set().union(*(reach[b] for b in mine)) for mine in reach]
    return reach


@given(made_up_rows())
def test_groups_are_the_closure_of_what_two_rows_share(rows: list[Row]) -> None:
    numbers = data.groups(rows)
    assert [{b for b, other in enumerate(numbers) if other == mine} for mine in numbers] == joined_by_hand(rows)
    assert list(dict.fromkeys(numbers)) == list(range(len(set(numbers)))), "groups are numbered in order of appearance"


@given(made_up_rows(), st.randoms())
def test_groups_do_not_depend_on_the_order_of_rows(rows: list[Row], rng: Any) -> None:
    order = list(range(len(rows)))
    rng.shuffle(order)
    before, after = data.groups(rows), data.groups([rows[i] for i in order])
    assert len({(before[i], n) for i, n in zip(order, after, strict=True)}) == len(set(before)) == len(set(after))


def diseases(count: int, **shared: Any) -> list[Row]:
    """Rows about ``count`` diseases that share nothing but what is given."""
    own = [
        {"question": f"What causes Disease {n} ?", "answer": f"Answer number {n} stands alone.", "focus": f"Disease {n}"}
        for n in range(count)
    ]
    return [row(**{**mine, **shared}) for mine in own]


def test_a_rare_concept_or_answer_joins_diseases_and_a_common_one_does_not() -> None:
    for shared, most in (({"cui": ["C1"]}, 5), ({"answer": "the same paragraph " * 20}, 10), ({"answer": "short"}, 10)):
        assert len(set(data.groups(diseases(most, **shared)))) == 1
        assert len(set(data.groups(diseases(most + 1, **shared)))) == most + 1
    assert len(set(data.groups(diseases(99, url="u")))) == 1
    assert len(set(data.groups(diseases(12)))) == 12


def test_rows_without_any_focus_are_one_group() -> None:
    rows = [row(f"tell me about {n}", f"Answer number {n}.", focus=focus) for n, focus in enumerate([None, "", None])]
    assert data.groups([*rows, *diseases(2)]) == [0, 0, 0, 1, 2]
    assert data.groups([]) == []


def test_boilerplate_is_an_answer_of_more_than_ten_diseases_the_most_common_first() -> None:
    rows = [*diseases(11, answer="eleven"), *diseases(10, answer="ten"), *diseases(12, answer="twelve"), *diseases(1, answer="one") * 30]
    assert list(data.boilerplate(rows).items()) == [("twelve", 12), ("eleven", 11)]


def as_split(rows: list[Row], seed: int = 0) -> Splits | None:
    try:
        return data.split(rows, (0.5, 0.25, 0.25), seed)
    except CourseError as error:
        assert "too few for three parts" in str(error)
        return None


@given(made_up_rows(), st.integers(0, 50))
def test_a_grouped_split_keeps_every_row_and_leaks_nothing_but_boilerplate(rows: list[Row], seed: int) -> None:
    parts = as_split(rows, seed)
    if parts is None:
        return
    assert sorted(map(repr, parts.train + parts.validation + parts.test)) == sorted(map(repr, rows))
    report = data.leakage_report(parts)
    assert [b["answer"] for b in report.pop("boilerplate")] == list(data.boilerplate(parts.train + parts.validation + parts.test))
    for shares in report.values():
        assert [shares[name] for name in ("focus", "normalised question", "question", "answer but boilerplate")] == [0] * 4
    for a, b in combinations((parts.train, parts.validation, parts.test), 2):
        assert not {r["url"] for r in a} & {r["url"] for r in b} - {None}


@given(st.integers(0, 1000), st.integers(1, 60))
def test_a_row_keeps_its_part_when_other_diseases_are_added(seed: int, added: int) -> None:
    old = [row(f"What causes Old {n // 2} ?", f"old answer {n}", focus=f"Old {n // 2}", url=f"old/{n // 2}") for n in range(300)]
    new = [row(f"What causes New {n} ?", f"new answer {n}", focus=f"New {n}", url=f"new/{n}") for n in range(added)]
    before, after = data.split(old, seed=seed), data.split([*new, *old], seed=seed)
    assert moved(old, before, after) == 0
    assert moved(old, before, data.split(list(reversed(old)), seed=seed)) == 0


def test_a_split_is_decided_by_its_seed() -> None:
    rows = diseases(300)
    assert data.split(rows, seed=3) == data.split(rows, seed=3)
    assert data.split(rows, seed=3) != data.split(rows, seed=4)


NOT_A_NUMBER = float("nan")


@pytest.mark.parametrize("by", [data.split, data.split_by_row])
@pytest.mark.parametrize(
    "fractions", [(0.8, 0.1, 0.2), (0.5, 0.2, 0.2), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1), (0.8, 0.3, -0.1), (NOT_A_NUMBER, 0.5, 0.5)]
)
def test_fractions_must_be_positive_and_add_up_to_one(by: Any, fractions: tuple[float, float, float]) -> None:
    with pytest.raises(CourseError, match=r"must be positive and add up to 1, for example \(0\.8, 0\.1, 0\.1\)"):
        by(diseases(100), fractions)


def test_other_fractions_are_kept_to() -> None:
    sizes = data.split(diseases(3000), (0.5, 0.3, 0.2)).sizes()
    for n, want in zip(sizes.values(), (0.5, 0.3, 0.2), strict=True):
        assert n / 3000 == pytest.approx(want, abs=0.03)


def test_one_group_alone_cannot_be_split_and_the_message_names_the_column_that_helps() -> None:
    questions = [row(f"why is thing {n} so?", f"Because of reason {n}.") for n in range(40)]
    for rows in ([row(focus="Asthma")] * 40, questions):
        with pytest.raises(CourseError, match=r"40 rows in 1 groups are too few for three parts: .*add a column focus"):
            data.split(rows)
    named = [{**r, "focus": f"Thing {n}"} for n, r in enumerate(questions)]
    assert sum(data.split(named).sizes().values()) == 40


def test_no_rows_cannot_be_split() -> None:
    with pytest.raises(CourseError, match="0 rows in 0 groups are too few"):
        data.split([])


@pytest.mark.parametrize("seed", range(5))
def test_a_group_larger_than_the_test_part_goes_to_training_and_is_named(seed: int) -> None:
    large = [row(f"How to prevent Gout {n} ?", f"Gout answer {n}.", focus="Gout") for n in range(41)]
    rows = [*diseases(359), *large]
    parts = data.split(rows, seed=seed)
    assert [r for r in parts.train if r["focus"] == "Gout"] == large
    assert parts.notes == ["group 'gout' (41 rows) is larger than a part of 40: kept in training"]
    assert data.split(rows[:-1] + diseases(1, focus="One more"), seed=seed).notes == []


# ---- leakage --------------------------------------------------------------------------------------------------------


def test_leakage_is_the_share_of_test_rows_that_training_knows() -> None:
    train = [row("What causes Gout ?", "A", focus="Gout"), row("what causes flu?", "B", focus="Flu")]
    test = [
        row("What causes Gout ?", "C", focus="Gout"),
        row("How to prevent Gout ?", "D", focus="gout"),
        row("What causes FLU ?", "B", focus="Influenza"),
        row("What causes Acne ?", "E", focus="Acne"),
    ]
    assert data.leakage(train, test) == {
        "question": 0.25, "normalised question": 0.5, "focus": 0.5, "answer": 0.25, "answer but boilerplate": 0.25, "8-gram": 0,
    }  # fmt: skip
    for nothing in (data.leakage(train, []), data.leakage([], test), data.leakage([], [])):
        assert set(nothing.values()) == {0}


def test_rows_without_a_focus_share_none_and_boilerplate_is_set_apart() -> None:
    nameless = [row(f"tell me about {n}", f"Answer {n}.") for n in range(2)]
    assert data.leakage(nameless[:1], nameless[1:])["focus"] == 0
    shares = data.leakage(diseases(10, answer="the same"), [*diseases(11, answer="the same")[10:], row("Why ?", "another")])
    assert (shares["answer"], shares["answer but boilerplate"]) == (0.5, 0)


def test_a_run_of_eight_words_is_known_whatever_its_case_and_punctuation_and_never_crosses_answers() -> None:
    eight = row(answer="One two three four five six seven eight")
    assert data.leakage([eight], [row(answer="one, TWO three: four five six seven eight!")])["8-gram"] == 1
    assert data.leakage([eight], [row(answer="One two three four five six seven eight nine")])["8-gram"] == 0.5
    assert data.leakage([eight], [row(answer="Two one three four five six seven eight")])["8-gram"] == 0
    halves = [row(answer="one two three four"), row(answer="five six seven eight")]
    assert data.leakage(halves, [eight])["8-gram"] == 0
    assert data.leakage([eight], halves)["8-gram"] == 0


words = st.lists(st.sampled_from(["a", "b", "c,", "A"]), max_size=14).map(" ".join)
answers = st.lists(words.map(lambda text: row(answer=text)), max_size=6)


@given(answers, answers)
def test_shared_runs_are_those_that_sets_of_words_count(train: list[Row], test: list[Row]) -> None:
    def runs(rows: list[Row]) -> list[tuple[str, ...]]:
        said = [r["answer"].lower().replace(",", "").split() for r in rows]
        return [tuple(text[n : n + 8]) for text in said for n in range(len(text) - 7)]

    known, asked = set(runs(train)), runs(test)
    expected = sum(run in known for run in asked) / len(asked) if asked else 0
    assert data.leakage(train, test)["8-gram"] == pytest.approx(expected)


def test_the_focus_recovered_from_made_up_questions_is_measured() -> None:
    rows = [*diseases(60), *(row(f"why is thing {n} so?", f"Because {n}.", focus=f"Thing {n}") for n in range(20))]
    rows.append(row("What causes Novelty ?", "A thing that is new.", focus="Another name"))
    measured = data.focus_recovery(rows)
    assert measured["found"] == pytest.approx(61 / 81)
    assert measured["precision"] == pytest.approx(60 / 61)
    assert measured["leak"] == 0
    one_page = data.focus_recovery(diseases(200, url="the same page"))
    assert (one_page["found"], one_page["precision"], one_page["leak"]) == (1, 1, 1)
    with pytest.raises(CourseError, match="too few for three parts"):
        data.focus_recovery([row(f"why is thing {n} so?", f"Because {n}.", focus=f"Thing {n}") for n in range(60)])


# ---- sub-corpora ----------------------------------------------------------------------------------------------------


def test_a_row_belongs_to_a_specialty_by_its_focus_a_synonym_or_a_semantic_type() -> None:
    rows = [
        row(focus="Heart failure"),
        row(focus="Holt-Oram syndrome", synonyms=["HOS", "Heart-hand syndrome"]),
        row("What causes Angina ?"),
        row(focus="Gout", synonyms=["Toe pain"], semantic_type=["T047"]),
        row(focus="Heartburn"),
        row(focus="Sweetheart disease"),
        row(focus="Odd growth", semantic_type=["T047", "T191"]),
    ]
    assert data.select(rows, "cardiology", least=1) == rows[:3]
    assert data.select(rows, "oncology", least=1) == [rows[6]]
    assert data.select(rows, Specialty("gout|toe pain"), least=1) == [rows[3]]
    assert data.select(rows, Specialty("", ("T047",)), least=1) == [rows[3], rows[6]]
    assert data.select(rows, Specialty("odd", ("T047",)), least=1) == [rows[3], rows[6]]


def test_a_specialty_that_is_unknown_or_too_small_is_refused() -> None:
    with pytest.raises(CourseError, match=r"no specialty 'heart': there are cardiology, .*Specialty\(names=\.\.\.\)"):
        data.select([], "heart")
    with pytest.raises(CourseError, match=r"49 rows about 'cardiology' are too few to train on \(at least 50\)"):
        data.select([row(focus="Angina")] * 49, "cardiology")
    assert len(data.select([row(focus="Angina")] * 50, "cardiology")) == 50
    with pytest.raises(CourseError, match=r"1 rows about 'gout' are too few"):
        data.select([row(focus="Gout")], Specialty("gout"))


def test_a_specialty_that_is_no_pattern_is_refused_when_it_is_defined() -> None:
    with pytest.raises(CourseError, match=r"Specialty\(names='heart\('\) is no pattern"):
        Specialty("heart(")


# ---- whole files ----------------------------------------------------------------------------------------------------


@contextmanager
def a_disk_that_takes(size: int) -> Iterator[None]:
    """Every write beyond ``size`` bytes of a file fails, as on a full disk: the operating system's own limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_interrupt_in_mid_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    data.write_json(path, "old")
    with pytest.raises(KeyboardInterrupt), data.whole_file(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
    assert json.loads(path.read_text()) == "old"


def test_no_space_left_leaves_the_old_file_whole_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    data.write_json(path, "old")
    with (
        pytest.raises(CourseError, match=r"cannot write value\.json: No space left on device\. Free some space"),
        data.whole_file(path) as new,
    ):
        new.symlink_to("/dev/full")
        new.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
    assert json.loads(path.read_text()) == "old"


def test_a_disk_that_fills_up_in_mid_write_loses_neither_json_nor_rows(tmp_path: Path) -> None:
    data.write_json(tmp_path / "value.json", "old")
    data.write_rows(tmp_path / "rows.parquet", [row()])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    larger = [row(answer=f"{n} " * 99) for n in range(5000)]
    with a_disk_that_takes(2000):
        for write in (data.write_json, data.write_rows):
            with pytest.raises(CourseError, match="cannot write"):
                write(tmp_path / ("value.json" if write is data.write_json else "rows.parquet"), larger)  # type: ignore[operator]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(CourseError, match="choose another folder with out="):
        data.write_json(tmp_path / "runs" / "tiny" / "value.json", 1)


def test_a_file_that_is_no_parquet_says_how_to_make_it_again(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "rows.parquet", [row(answer=f"answer {n}") for n in range(100)])
    (tmp_path / "rows.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-100])
    for name in ("rows.parquet", "none.parquet"):
        with pytest.raises(CourseError, match=rf"cannot read {name}.*run lesson 01 again"):
            data.read_rows(tmp_path / name)


# ---- the stage ------------------------------------------------------------------------------------------------------


def stage_times(plan: Plan) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (plan.folder / "data").iterdir()}


def test_prepare_writes_once_and_reads_back_the_same(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)
    made = data.prepare(plan)
    files = stage_times(plan)
    assert set(files) == {"train.parquet", "validation.parquet", "test.parquet", "leakage.json", "data.json"}
    assert data.prepare(plan) == made
    assert stage_times(plan) == files
    card = json.loads((plan.folder / "data" / "data.json").read_text())
    assert card["rows"] == made.sizes()
    assert sum(made.sizes().values()) == card["loaded"] - sum(effect["dropped"] for effect in card["cleaning"].values())
    assert card["leakage"] == json.loads((plan.folder / "data" / "leakage.json").read_text()) == data.leakage_report(made)
    assert str(tmp_path) not in json.dumps(card)


def test_prepare_makes_another_recipe_again(tmp_path: Path) -> None:
    first = data.prepare(plan_for(tmp_path, seed=0))
    assert data.prepare(plan_for(tmp_path, seed=1)) != first
    questions = [row(f"What causes Disease {n} ?", focus=f"Disease {n}") for n in range(60)]
    path = write_table(tmp_path / "mine.jsonl", questions)
    assert sum(data.prepare(plan_for(tmp_path, "jsonl", path, seed=1)).sizes().values()) == 60
    assert data.prepare(plan_for(tmp_path, seed=0)) == first


def test_prepare_makes_the_stage_again_when_its_source_has_changed(tmp_path: Path) -> None:
    old, new = (
        [row(f"What causes Disease {n} ?", answer, focus=f"Disease {n}") for n in range(60)] for answer in ("a b c d e", "v w x y z")
    )
    for folder, rows in (("one", old), ("two", new), ("one", old), ("one", new)):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = write_table(tmp_path / folder / "mine.jsonl", rows)
        made = data.prepare(plan_for(tmp_path, "jsonl", path))
        assert {r["answer"] for r in made.train} == {rows[0]["answer"]}


def test_prepare_makes_the_stage_again_when_a_part_was_deleted(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)
    made = data.prepare(plan)
    (plan.folder / "data" / "test.parquet").unlink()
    assert data.prepare(plan) == made
    assert (plan.folder / "data" / "test.parquet").is_file()


def test_an_interrupted_prepare_never_mixes_the_parts_of_two_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = plan_for(tmp_path, seed=0)
    made = data.prepare(old)
    real, calls = pyarrow.parquet.write_table, []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pyarrow.parquet, "write_table", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.prepare(plan_for(tmp_path, seed=1))
    assert data.prepare(old) == made


def test_a_sub_corpus_in_the_plans_folder_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)
    part, _ = data.make(plan, plan.folder / "data", specialty="infectious diseases")
    off, _ = data.make(plan, plan.folder / "data", without=["white space"])
    whole = data.prepare(plan)
    assert sum(part.sizes().values()) < sum(whole.sizes().values())
    assert "white space" in whole.cleaning and "white space" not in off.cleaning


def test_draw_takes_the_same_rows_in_the_same_order_for_a_seed() -> None:
    rows = [row(f"What causes Disease {n} ?") for n in range(200)]
    drawn = data.draw(rows, 20, seed=1)
    assert len(drawn) == 20 == len({r["question"] for r in drawn})
    assert drawn == data.draw(list(reversed(rows)), 20, seed=1) == data.draw(rows, 40, seed=1)[:20]
    assert drawn != data.draw(rows, 20, seed=2)
    everything = data.draw(rows, 0, seed=1)
    assert everything != rows
    assert sorted(r["question"] for r in everything) == sorted(r["question"] for r in rows)
    even = data.draw(rows, 20, seed=1, fits=lambda r: r["question"].endswith(("0 ?", "2 ?", "4 ?", "6 ?", "8 ?")))
    assert even == [r for r in everything if int(r["question"].split()[3]) % 2 == 0][:20]
