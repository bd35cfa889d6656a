"""Sources, cleaning, grouped splits and the files of the data stage."""

from __future__ import annotations

import csv
import json
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medquad_utils import data
from medquad_utils.data import COLUMNS, LISTS, REQUIRED, Loaded, Row, Splits
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
def from_xml(medquad_xml: Path) -> Loaded:
    return data.load_xml(medquad_xml)


@pytest.fixture(scope="module")
def from_csv(medquad_csv: Path) -> Loaded:
    return data.load_table(medquad_csv)


def test_the_xml_holds_what_was_counted_in_it(from_xml: Loaded) -> None:
    assert (len(from_xml.rows), from_xml.skipped) == (ROWS, [])
    assert Counter(r["source"] for r in from_xml.rows) == SOURCES
    assert Counter(r["qtype"] for r in from_xml.rows) == QTYPES
    assert sum(r["focus"] is None for r in from_xml.rows) == 14


def test_the_csv_holds_the_same_rows_as_the_xml(from_xml: Loaded, from_csv: Loaded) -> None:
    def texts(loaded: Loaded) -> Counter[tuple[str, ...]]:
        return Counter(tuple(" ".join(r[c].split()) for c in REQUIRED) for r in loaded.rows)

    assert (len(from_csv.rows), from_csv.skipped) == (ROWS, [])
    assert texts(from_xml) == texts(from_csv)


def test_every_source_is_brought_to_one_schema_with_null_for_what_it_lacks(from_xml: Loaded, from_csv: Loaded, tmp_path: Path) -> None:
    sample = data.load(plan_for(tmp_path))
    lacks = {id(from_xml): set(), id(from_csv): set(COLUMNS) - set(REQUIRED), id(sample): {"cui", "url"}}
    for loaded in (from_xml, from_csv, sample):
        for r in loaded.rows:
            assert tuple(r) == COLUMNS
            assert all(isinstance(r[c], str) and r[c] == r[c].strip() != "" for c in REQUIRED)
            for c in set(COLUMNS) - set(REQUIRED):
                values = r[c] if c in LISTS and r[c] is not None else [r[c]]
                assert values == [None] or all(isinstance(x, str) and x for x in values), (c, r[c])
        never = {c for c in COLUMNS if all(r[c] is None for r in loaded.rows)}
        assert never == lacks[id(loaded)]


def test_the_templates_cover_nearly_all_real_questions(from_xml: Loaded) -> None:
    found = [(data.template_of(r["question"]), r["focus"]) for r in from_xml.rows]
    assert sum(f is not None for f, _ in found) / ROWS > 0.997
    assert len({f[0] for f, _ in found if f}) == len(data.TEMPLATES), "a template that no question follows"
    assert [focus for f, focus in found if f and focus and data.normalise(f[1]) != data.normalise(focus)] == []


def test_real_groups_are_many_and_none_is_large(from_xml: Loaded) -> None:
    sizes = Counter(data.groups(from_xml.rows))
    assert 3700 <= len(sizes) <= 3850
    assert max(sizes.values()) < 160


@pytest.mark.parametrize("seed", [0, 1])
def test_a_grouped_split_of_the_real_data_leaks_nothing(from_xml: Loaded, from_csv: Loaded, seed: int) -> None:
    for loaded in (from_xml, from_csv):
        parts = data.split(loaded.rows, seed=seed)
        sizes = parts.sizes()
        assert sum(sizes.values()) == ROWS
        assert [abs(n / ROWS - want) < 0.02 for n, want in zip(sizes.values(), (0.8, 0.1, 0.1), strict=True)] == [True] * 3
        for held_out in (parts.validation, parts.test):
            shares = data.leakage(parts.train, held_out)
            assert (shares["question"], shares["normalised question"], shares["focus"]) == (0, 0, 0)
            assert not {r["url"] for r in parts.train} - {None} & {r["url"] for r in held_out}


def test_a_random_split_of_the_real_data_leaks_as_measured(from_xml: Loaded) -> None:
    shares = []
    for seed in range(3):
        parts = data.split_by_row(from_xml.rows, (0.8, 0.1, 0.1), seed)
        assert sum(parts.sizes().values()) == ROWS
        shares.append(data.leakage(parts.train + parts.validation, parts.test))
    for name, measured in {"focus": 0.858, "normalised question": 0.204, "question": 0.134}.items():
        assert sum(s[name] for s in shares) / len(shares) == pytest.approx(measured, abs=0.02)


def test_cleaning_the_real_data_drops_what_was_counted(from_xml: Loaded) -> None:
    kept, counts = data.clean(from_xml.rows)
    assert 15_200 <= len(kept) <= 15_300
    assert (counts["link list"], counts["exact duplicate"]) == (pytest.approx(1085, abs=5), 48)
    assert data.clean(kept) == (kept, dict.fromkeys(counts, 0)), "cleaning twice changes nothing more"


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
    data.write_rows(tmp_path / "out.parquet", data.clean(loaded.rows)[0])
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


# ---- cleaning -------------------------------------------------------------------------------------------------------


def test_each_rule_does_what_its_name_says_and_is_counted() -> None:
    plain = row()
    rows = [
        plain,
        row(answer="Only four words here."),
        row(answer="These resources address the diagnosis or management of asthma: a, b, c."),
        row(answer="The resources listed in this section can help you find more."),
        row(question="What  causes\tAsthma ?", answer="One two  three four five."),
        row(answer="What these resources address is something that prose may say."),
        row(question="What causes Gout ?"),
    ]
    kept, counts = data.clean(rows)
    assert kept == [plain, rows[5], rows[6]]
    assert counts == {"white space": 1, "under five words": 1, "link list": 2, "exact duplicate": 1}
    everything, counts = data.clean(rows, without=(*data.RULES, "exact duplicate"))
    assert everything == rows
    assert set(counts.values()) == {0}
    with_links, counts = data.clean(rows, without=["link list"])
    assert (len(with_links), counts["link list"]) == (5, 0)


def test_cleaning_changes_no_row_in_place() -> None:
    rows = [row(answer="  One  two three four five. ")]
    before = [dict(r) for r in rows]
    assert data.clean(rows)[0][0]["answer"] == "One two three four five."
    assert rows == before


# ---- groups and splits ----------------------------------------------------------------------------------------------

foci = st.sampled_from([None, "", "Asthma", "asthma!", "Gout", "Flu", "Lupus", "Measles", "Mumps", "Acne"])
texts = st.sampled_from([f"{letter} {'word ' * n}" for letter in "abc" for n in (1, 60)])


@st.composite
def made_up_rows(draw: st.DrawFn) -> list[Row]:
    """Rows in which foci, URLs, concepts and answers are shared in every way; some lack a focus, some follow no template."""
    rows = []
    for number in range(draw(st.integers(1, 25))):
        focus = draw(foci)
        other = draw(st.sampled_from(["Asthma", "Gout", "Cough", f"Disease {number}"]))
        question = draw(st.sampled_from(["What causes {} ?", "What is (are) {} ?", "How to prevent {} ?"])).format(focus or other)
        question = question if focus else draw(st.sampled_from([question, f"tell me about {other}", f"Tell me about {other}!"]))
        url = draw(st.none() | st.sampled_from(["u1", "u2", "u3"]) | st.just(f"own {number}"))
        cui = draw(st.none() | st.lists(st.sampled_from(["C1", "C2", "C3", "C4"]), max_size=2))
        rows.append(row(question, draw(texts), focus=focus or None, url=url, cui=cui))
    return rows


@given(made_up_rows())
def test_rows_that_share_a_focus_a_url_or_a_question_are_one_group(rows: list[Row]) -> None:
    numbers = data.groups(rows)
    keys = (data.focus_of, lambda r: r["url"], lambda r: data.normalise(r["question"]))
    for key in keys:
        seen: dict[Any, int] = {}
        for r, number in zip(rows, numbers, strict=True):
            if key(r):
                assert seen.setdefault(key(r), number) == number
    assert sorted(set(numbers)) == list(range(len(set(numbers)))), "groups are numbered in order of appearance"


@given(made_up_rows(), st.randoms())
def test_groups_do_not_depend_on_the_order_of_rows(rows: list[Row], rng: Any) -> None:
    order = list(range(len(rows)))
    rng.shuffle(order)
    before, after = data.groups(rows), data.groups([rows[i] for i in order])
    assert len({(before[i], n) for i, n in zip(order, after, strict=True)}) == len(set(before)) == len(set(after))


def test_a_rare_concept_or_paragraph_joins_diseases_and_a_common_one_does_not() -> None:
    def diseases(count: int, **shared: Any) -> list[Row]:
        return [row(f"What causes Disease {n} ?", **{"answer": f"short {n}", "focus": f"Disease {n}", **shared}) for n in range(count)]

    for shared in ({"cui": ["C1"]}, {"answer": "the same paragraph " * 20}):
        assert len(set(data.groups(diseases(5, **shared)))) == 1
        assert len(set(data.groups(diseases(6, **shared)))) == 6
    assert len(set(data.groups(diseases(5, answer="short")))) == 5
    assert len(set(data.groups(diseases(9, url="u")))) == 1


def as_split(rows: list[Row], seed: int = 0) -> Splits | None:
    try:
        return data.split(rows, (0.5, 0.25, 0.25), seed)
    except CourseError as error:
        assert "too few for three parts" in str(error)
        return None


@given(made_up_rows(), st.integers(0, 50))
def test_a_grouped_split_keeps_every_row_and_leaks_no_focus_url_or_question(rows: list[Row], seed: int) -> None:
    parts = as_split(rows, seed)
    if parts is None:
        return
    assert sorted(map(repr, parts.train + parts.validation + parts.test)) == sorted(map(repr, rows))
    sides = (parts.train, parts.validation, parts.test)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        shares = data.leakage(sides[a], sides[b])
        assert (shares["focus"], shares["normalised question"], shares["question"]) == (0, 0, 0)
        assert not {r["url"] for r in sides[a]} & {r["url"] for r in sides[b]} - {None}


@given(st.integers(0, 1000), st.integers(1, 60))
def test_a_row_keeps_its_part_when_other_diseases_are_added(seed: int, added: int) -> None:
    old = [row(f"What causes Old {n // 2} ?", f"answer {n}", focus=f"Old {n // 2}", url=f"old/{n // 2}") for n in range(300)]
    new = [row(f"What causes New {n} ?", f"answer {n}", focus=f"New {n}", url=f"new/{n}") for n in range(added)]
    before, after = data.split(old, seed=seed), data.split([*new, *old], seed=seed)
    for part in ("train", "validation", "test"):
        assert [r for r in getattr(after, part) if r["focus"].startswith("Old")] == getattr(before, part)


def test_a_split_is_decided_by_its_seed() -> None:
    rows = [row(f"What causes Disease {n} ?", focus=f"Disease {n}") for n in range(300)]
    assert data.split(rows, seed=3) == data.split(rows, seed=3)
    assert data.split(rows, seed=3) != data.split(rows, seed=4)


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1)])
def test_fractions_must_be_positive_and_add_up_to_one(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(CourseError, match="must be positive and add up to 1"):
        data.split([row()], fractions)


def test_too_few_groups_for_three_parts_is_said() -> None:
    with pytest.raises(CourseError, match="5 rows in 1 groups are too few"):
        data.split([row(focus="Asthma")] * 5)


def test_leakage_is_the_share_of_test_rows_that_training_knows() -> None:
    train = [row("What causes Gout ?", "A", focus="Gout"), row("what causes flu?", "B", focus="Flu")]
    test = [
        row("What causes Gout ?", "C", focus="Gout"),
        row("How to prevent Gout ?", "D", focus="gout"),
        row("What causes FLU ?", "B", focus="Influenza"),
        row("What causes Acne ?", "E", focus="Acne"),
    ]
    assert data.leakage(train, test) == {"question": 0.25, "normalised question": 0.5, "focus": 0.5, "answer": 0.25}
    assert set(data.leakage(train, []).values()) == {0}


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
    assert set(files) == {"train.parquet", "validation.parquet", "test.parquet", "data.json"}
    assert data.prepare(plan) == made
    assert stage_times(plan) == files
    card = json.loads((plan.folder / "data" / "data.json").read_text())
    assert card["rows"] == made.sizes()
    assert sum(made.sizes().values()) == card["loaded"] - sum(n for rule, n in card["cleaning"].items() if rule != "white space")
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
