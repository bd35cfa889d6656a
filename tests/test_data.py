"""Sources, groups, split, leakage, specialties and the written of the data stage."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unicodedata import normalize
from unittest.mock import Mock

import huggingface_hub
import pandas
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import REPO, tiny
from hypothesis import given
from hypothesis import strategies as st

from medquad_utils import CourseError, atomic, data, files, specialties, splits
from medquad_utils.files import COLUMNS, REQUIRED, Row
from medquad_utils.profiles import Plan
from medquad_utils.splits import PARTS
from medquad_utils.tables import has_words

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


ROWS = 16_423
IN_CSV = 16_407  # the Hub's table lacks the files of the second layout
QTYPES = {
    "information": 4539, "symptoms": 2748, "treatment": 2446, "inheritance": 1446,
    "frequency": 1120, "genetic changes": 1087, "causes": 727, "exams and tests": 653,
    "research": 399, "outlook": 365, "susceptibility": 324, "considerations": 235,
    "prevention": 210, "stages": 77, "complications": 46, "support groups": 1,
}  # fmt: skip
SECOND = ("0000007", "0000018", "0000182", "0000244")


@pytest.mark.full
def test_real_xml_and_csv_hold_the_counted_rows(real_rows: list[Row], medquad_csv: Path) -> None:
    def texts(rows: list[Row]) -> Counter[tuple[str, ...]]:
        return Counter(tuple(" ".join(r[c].split()) for c in REQUIRED) for r in rows)

    assert len(real_rows) == ROWS
    assert len({r["source"] for r in real_rows}) == 9
    assert Counter(r["qtype"] for r in real_rows) == QTYPES
    assert sum(r["focus"] is None for r in real_rows) == 14
    second = [r for r in real_rows if r["document_id"] in SECOND and r["source"] == "NINDS"]
    assert len(second) == ROWS - IN_CSV
    from_csv = data.load_table(medquad_csv)
    assert texts(from_csv.rows) == texts(real_rows) - texts(second)
    assert (len(from_csv.rows), from_csv.records, from_csv.notes) == (IN_CSV, IN_CSV, {})
    assert {tuple(r) for r in [*real_rows, *from_csv.rows]} == {COLUMNS}


@pytest.mark.full
def test_real_questions_follow_the_templates_and_form_small_groups(real_rows: list[Row]) -> None:
    found = [splits.template_of(r["question"]) for r in real_rows]
    assert all(r["qtype"] == splits.TYPES[f[0]] for r, f in zip(real_rows, found, strict=True) if f)
    assert sum(f is not None for f in found) / ROWS > 0.996
    assert len({f[0] for f in found if f}) == len(splits.TEMPLATES), "a template without a question"
    sizes = Counter(splits.groups(real_rows))
    assert 3700 <= len(sizes) <= 3850 and 100 <= max(sizes.values()) <= 160


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
            whole = Counter(r["qtype"] for r in rows)
            for part, near in ((split.test, 0.03), (split.validation, 0.035)):
                counts = Counter(r["qtype"] for r in part)
                large = [counts[name] / whole[name] for name, n in QTYPES.items() if n >= 70]
                assert large == pytest.approx([0.1] * 14, abs=near)


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
LATER = """<doc docid="8" corpus="NINDS" url="https://example.org/8">
<doctitle-focus>Gout</doctitle-focus><umls><cui>C3</cui><semanticType></semanticType></umls>
<qaPairs><pair pid="1"><question qid="8-1" qtype="outlook">what is the prognosis for Gout ?
</question><answer> Good. </answer></pair></qaPairs></doc>"""


def test_xml_gives_rows_of_both_layouts_and_skips_broken_files_by_name(tmp_path: Path) -> None:
    good = {"a.xml": DOCUMENT, "b.XML": LATER, "c.xml": '<Document id="9"/>', "._a.xml": "Mac"}
    (tmp_path / "GARD").mkdir()
    for name, content in (BROKEN | {k: v.encode() for k, v in good.items()}).items():
        (tmp_path / "GARD" / name).write_bytes(content)
    loaded = data.load(tiny(tmp_path, source="xml", data_path=str(tmp_path)))
    known = {
        "focus": "Sjögren syndrome", "synonyms": ["SS"], "cui": ["C1", "C2"], "source": "GARD",
        "semantic_type": ["T047"], "url": "https://example.org/7", "document_id": "7",
    }  # fmt: skip
    later = {
        "qtype": "outlook", "focus": "Gout", "cui": ["C3"], "source": "NINDS",
        "url": "https://example.org/8", "document_id": "8",
    }  # fmt: skip
    assert loaded.rows == [
        row("What causes Sjögren syndrome ?", "Nobody knows.", **known),
        row("what is the prognosis for Gout ?", "Good.", **later),
    ]
    broken = sorted(str(place).split(" (")[0] for place in loaded.skipped.pop("broken XML"))
    assert broken == sorted(f"GARD/{name}" for name in BROKEN)
    assert loaded.skipped == {
        "no answer": ["7"], "no question": ["7"], "a document without questions": ["9"]
    }  # fmt: skip


letters = st.characters(exclude_categories=["Cc", "Cf", "Cs"], exclude_characters="[")
letters |= st.sampled_from("\n\t\r\u200d")
line = st.text(letters, min_size=1, max_size=30).map(lambda text: normalize("NFC", text))
cell = line.filter(lambda t: has_words(t) and t.strip().lower() not in data.MISSING)
record = st.fixed_dictionaries({"qtype": cell, "Question": cell, "Answer": cell})


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@given(rows=st.lists(record, min_size=1, max_size=5))
def test_tables_give_back_any_text(kind: str, tmp_path_factory: Any, rows: list[Any]) -> None:
    path = write_table(tmp_path_factory.getbasetemp() / f"any.{kind}", rows)
    expected = [BARE | {k.lower(): v.strip() for k, v in r.items()} for r in rows]
    assert data.load_table(path).rows == expected, "any text comes back"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_tables_keep_lists_and_every_column(kind: str, tmp_path: Path) -> None:
    lists = {"synonyms": ["one", "two"], "cui": ["C1"], "semantic_type": ["T047"]}
    whole = row(focus="Asthma", source="a\u2028b", url="u", document_id="7", **lists)
    assert data.load_table(write_table(tmp_path / f"rows.{kind}", [whole])).rows == [whole]


NAN = float("nan")
GOOD = {"qtype": "a", "question": "What causes A ?", "answer": "c"}
WRONG = [{"answer": 5}, {"question": ["b", "c"]}, {"answer": {"text": "c"}}]
WRONG += [{"answer": text} for text in ("['a' 'b']", "['x', 3]", '["cut", "off]')]
EMPTY = [{"answer": value} for value in (None, NAN, "", " \u200b", "N/A", "-", [])]


def test_every_record_is_a_row_or_counted_with_its_reason(tmp_path: Path) -> None:
    others = [{"question": " "}, {"qtype": " "}, {"answer": ["c", "d"], "question": ["Why ?"]}]
    # The question of record 3 is a list of two.
    records = [GOOD, *(GOOD | wrong for wrong in [*WRONG, *EMPTY, *others])]
    loaded = data.load_table(write_table(tmp_path / "rows.jsonl", records))
    assert loaded.rows == [
        BARE | GOOD, BARE | GOOD | {"qtype": "causes"}, BARE | GOOD | {"question": "Why ?"}
    ]  # fmt: skip
    assert loaded.skipped == {
        "answer is not text": [2, 4, 5, 6, 7], "several questions in one record": [3],
        "no question": [15],
        "no answer": [8, 9, 10, 11, 12, 13, 14],
    }  # fmt: skip
    assert loaded.records == len(records)
    assert "3 rows of 17 records; 5 x answer is not text (record 2, 4, 5, 6, 7); " in str(loaded)
    assert loaded.origins[2] == (17, ["c", "d"]), "evaluation counts both as right"
    path = write_table(tmp_path / "a.parquet", [GOOD | {"focus": NAN, "cui": NAN, "url": 1.0}])
    assert data.load_table(path).rows == [BARE | GOOD], "NaN and numbers are unknown values"


def test_texts_pass_one_gate(tmp_path: Path) -> None:
    raw = {"question": "What\x00 causes Sjo\u0308gren ?\ud800", "answer": "\ufeffA\x0cb.\u202e\nC."}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(raw | {"cui": ["C1\x07|C2"]}) + "\n")
    loaded = data.load_table(path)
    only = row("What causes Sjögren ?", "A b.\nC.", cui=["C1", "C2"])
    assert (loaded.rows, loaded.notes[data.CLEANED]) == ([only], [1])


@pytest.mark.parametrize("answer", ["A <b>kind</b> of rash.", "Salt &amp; water.", "Itâ€™s gout."])
def test_markup_and_wrong_letters_are_kept_and_counted(answer: str, tmp_path: Path) -> None:
    loaded = data.load_table(write_table(tmp_path / "a.jsonl", [GOOD, GOOD | {"answer": answer}]))
    assert (loaded.rows[1]["answer"], loaded.notes) == (answer, {data.FOREIGN: [2]})


HEAD, TEXT = "question,answer,source,focus_area", "“It’s 5 µg,” says Sjögren."
KAGGLE = f'{HEAD}\n"What causes Gout ?","{TEXT}",GARD,Gout\nWho knows?,"Two\nlines.",CDC,\n'
GOUT = row("What causes Gout ?", TEXT)
GIVEN = [GOUT | {"source": "GARD", "focus": "Gout"}]
GIVEN += [row("Who knows?", "Two\nlines.", source="CDC", qtype="information")]
LAVITA = {
    "document_id": "7", "document_source": "GARD", "document_url": "u", "category": None,
    "umls_cui": "C1|C2", "umls_semantic_types": "T047", "umls_semantic_group": "Disorders",
    "synonyms": "podagra|gouty arthritis", "question_id": "7-1", "question_focus": "Gout",
    "question_type": "causes", "question": "What causes Gout ?", "answer": TEXT,
}  # fmt: skip
LAVITA_ROW = GOUT | {
    "focus": "Gout", "synonyms": ["podagra", "gouty arthritis"], "cui": ["C1", "C2"],
    "semantic_type": ["T047"], "source": "GARD", "url": "u", "document_id": "7",
}  # fmt: skip
PAIR = {"instruction": "What causes Gout ?", "input": "", "output": TEXT}
DOCTOR = [PAIR | {"input": f"Why {n}?", "output": "So."} for n in "ab"]
TURNS = [
    {"role": "system", "content": "Be kind."}, {"role": "user", "content": "What causes Gout ?"},
    {"role": "assistant", "content": TEXT},
]  # fmt: skip
SHARED = [{"from": who, "value": TURNS[n]["content"]} for n, who in ((1, "human"), (2, "gpt"))]


def parted(mark: str) -> str:
    """The same table with another mark between cells."""
    return KAGGLE.replace(",", mark).replace(f"µg{mark}", "µg,")


def written(records: list[Any], name: str) -> str:
    """Records as one JSON list, or one on each line."""
    whole = [records] if name.endswith(".json") else records
    return "\n".join(json.dumps(r, ensure_ascii=False) for r in whole)


def plain(question: str, answer: str = "So.") -> Row:
    return row(question, answer, qtype="information")


# File -> its content, its encoding, the rows that it holds.
SHAPES: dict[str, tuple[str | list[Any], str, list[Row]]] = {
    "kaggle.csv": (KAGGLE, "utf-8", GIVEN),
    "BOM.CSV": ("\ufeff" + KAGGLE, "utf-8", GIVEN),
    "windows.csv": (parted(";"), "cp1252", GIVEN),
    "bars.csv": (parted("|"), "utf-8", GIVEN),
    "hint.csv": ("sep=|\r\n\r\n" + parted("|"), "utf-8", GIVEN),
    "unicode.csv": (parted("\t"), "utf-16", GIVEN),
    "a.tsv": (parted("\t"), "utf-8", GIVEN),
    "packed.csv.gz": (KAGGLE, "utf-8", GIVEN),
    "index.csv": (",Question Type,Question,Response\n0,,Why?,So.\n\n", "utf-8", [plain("Why?")]),
    "old mac.csv": ("prompt,completion\rWhy?,So.\r", "utf-8", [plain("Why?")]),
    "pandas.csv": ("question,answer\nWhy?,\"['So.', 'Or so.']\"\n", "utf-8", [plain("Why?")]),
    "note.csv": ("question,answer\nWhy?,[see [2]]\n", "utf-8", [plain("Why?", "[see [2]]")]),
    "alpaca.json": ([PAIR, PAIR | {"input": "Why?"}], "utf-8",
                    [GOUT, plain("What causes Gout ?\nWhy?", TEXT)]),
    "doctor.json": (DOCTOR, "utf-8", [plain("Why a?"), plain("Why b?")]),
    "pair.jsonl": ([{"prompt": "Why?", "completion": "So."}], "utf-16", [plain("Why?")]),
    "trl.json": ([{"prompt": TURNS[:2], "completion": TURNS[2:]}], "utf-8", [GOUT]),
    "chat.ndjson": ([{"messages": TURNS, "source": "GARD"}], "cp1252", [GOUT | {"source": "GARD"}]),
    "sharegpt.json": ([{"conversations": SHARED, "id": "7"}], "utf-8", [GOUT]),
    "pretty.json": ('{"Prompt":\n"Why?", "Answers": ["So."]}\n{"prompt": "Oh?","answer": "No."}',
                    "utf-8", [plain("Why?"), plain("Oh?", "No.")]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_files_are_read_as_users_have_them(name: str, tmp_path: Path) -> None:
    content, encoding, expected = SHAPES[name]
    raw = (written(content, name) if isinstance(content, list) else content).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    loaded = data.load_table(tmp_path / name)
    assert (loaded.rows, loaded.records) == (expected, len(expected))
    shared = f"{name} repeats one instruction: the questions are the inputs"
    assert (shared in loaded.notes) == (name == "doctor.json")
    said = [note for note in loaded.notes if "not in UTF-8" in note]
    assert said == ([] if encoding == "utf-8" else [f"{name} is not in UTF-8: read as {encoding}"])


def test_lavita_medquad_keeps_its_columns_and_counts_rows_without_answers(tmp_path: Path) -> None:
    records = [LAVITA, LAVITA | {"answer": None}, LAVITA | {"answer": None}]
    loaded = data.load_table(write_table(tmp_path / "a.parquet", records))
    assert (loaded.rows, loaded.skipped) == ([LAVITA_ROW], {"no answer": [2, 3]})
    options = data.load_table(write_table(tmp_path / "b.jsonl", [GOOD | {"Options": "A to D"}]))
    assert options.notes == {"b.jsonl has columns that are not read: options": [1]}


def test_folder_is_read_as_one_table_and_longer_chats_are_named(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write_table(tmp_path / "parts" / "b.parquet", [GOOD] * 2)
    more = [{"messages": TURNS + TURNS[1:]}, {"messages": TURNS[:2]}, {"messages": TURNS}]
    (tmp_path / "a.jsonl").write_text(written(more, "a.jsonl"))
    (tmp_path / "read me.md").write_text("no table")
    (tmp_path / "._a.jsonl").write_text("of a Mac")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.jsonl").write_text(written([GOOD], "a.jsonl"))
    loaded = data.load_table(tmp_path)
    assert loaded.rows == [GOUT, BARE | GOOD, BARE | GOOD]
    assert loaded.skipped == {"a chat that is not one question and its answer": [1, 2]}


def test_excel_files_need_an_extra_that_the_message_names(tmp_path: Path, monkeypatch: Any) -> None:
    said = [{"Question": "Why?", "Answer": answer} for answer in ("So.", "NA", None)]
    path, cells = tmp_path / "a.xlsx", pandas.DataFrame(said)
    cells.to_excel(path, index=False)
    loaded = data.load_table(path)
    assert loaded.rows == [plain("Why?"), plain("Why?", "NA")], "NA is a text, as in CSV"
    assert loaded.skipped == {"no answer": [3]}
    with pandas.ExcelWriter(path) as writer:
        cells.to_excel(writer, sheet_name="first")
        cells.to_excel(writer, sheet_name="second")
    with pytest.raises(CourseError, match=r"it has 2 sheets \(first, second\)"):
        data.load_table(path)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    needed = r"cannot read a\.xlsx.*pip install 'medquad-qlora\[excel\]'"
    with pytest.raises(CourseError, match=needed):
        data.load_table(path)


QA = "question,answer\nA?,a.\n"
REFUSED = {
    "two.csv": ("question,answer,Output\nA?,a,b\n", "'answer' and 'output' for the answer"),
    "none.csv": ("topic,answer\ngout,a\n", "no column for the question: .*found answer, topic"),
    "reply.csv": ("question,reply\nA?,a\n", "the answer: expected answer, .*found question, reply"),
    "twice.csv": ("question,answer,Answer\nA?,a,b\n", "header has the column 'answer' twice"),
    "again.csv": (f"{QA}{QA}", "line 3 repeats the header"),
    "long.csv": (f"{QA}B?,b, c\n", "line 3 has 3 cells, and the header 2 .question, answer."),
    "short.csv": (f"{QA}\nB?\n", "row in line 4 has 1 cells, and the header 2"),
    "open.csv": (f'{QA}B?,"b\nC?,c\nD?,d\n', "line 3: unexpected end of data.*quote is not closed"),
    "lost.csv": (f'{QA}B?,"b\nC?,"c"\n', "row in line 3: ',' expected after '\"'"),
    "mysql.csv": (f'{QA}B?,"a \\"good\\" day"\n', "row in line 3: ',' expected after '\"'"),
    "headless.csv": ("Why?,So.\nB?,b.\n", "no column for the question: .* found so, why"),
    "mixed.csv": (f"{QA}é,b\n".encode() + b"\xe9,c\n", "line 4 has bytes .* UTF-8 or cp1252"),
    "mac.csv": (f"{QA}".encode() + b"C?,doesn\xd5t\n", "line 3 has bytes that are no text"),
    "page.csv": ("<!doctype html>", "it is a web page"),
    "pointer.parquet": ("version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
    "excel.csv": (b"PK\x03\x04", "zip archive or an Excel file"),
    "cut.csv.gz": (gzip.compress(QA.encode())[:-9], "Compressed file ended"),
    "cut.jsonl": ('{"question": "A?", "answer": "a"}\n{"question": "B', "line 2 column 14"),
    "text.jsonl": ('{"question": "A?"}\n"a line"', "record 2 is not an object: a line"),
    "twice.json": ('[{"answer": "a", "Answer": "b"}]', "record 1 has the column 'answer' twice"),
    "key.jsonl": ('{"answer": "a"}\n{"Answer": "b", "q": {}, "Answer": "c"}\n',
                  "record 2 has the column 'answer' twice: delete or rename one"),
    "keys.json": ('[{"answer": "a"}, {"": 1, "": 2}, {"q": 1, "q": 1}]', "record 3 .* 'q' twice"),
    "deep.json": ("[" * 100_000, "cannot read deep.json: "),
    "torn.parquet": (b"PAR1" + bytes(99) + b"2\0\0\0PAR1", r"cannot read torn\.parquet: "),
    "list.csv": ('[{"question": "A?"}]', r"it is JSON: give its name the ending \.json"),
    "text.xlsx": ("no sheet", r"cannot read text\.xlsx: "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_a_guess_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CourseError, match=message) as refused:
        data.load_table(tmp_path / name)
    assert str(refused.value).startswith(f"cannot read {name}: ") and "\n" not in str(refused.value)


def test_a_file_that_may_not_be_read_needs_no_other_format(
    tmp_path: Path, monkeypatch: Any
) -> None:
    (path := tmp_path / "a.csv").write_text(QA)
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError(13, "No", str(path))))
    with pytest.raises(CourseError, match=r"^cannot read a\.csv: No\. .*or give another file\.$"):
        data.load_table(path)


UNUSABLE = {
    "a.csv": ("qtype,question,answer\n", "a.csv.* holds no question with an answer: 0 rows of 0"),
    "no.csv": ("", r"no table .*no\.csv.*that ends in \.csv, .* \.parquet"),
    "a.jsonl": ('{"question": "A?", "answer": ""}', "0 rows of 1 records; 1 x no answer"),
    "no.xml": ("", r"no XML files .*git clone https://github\.com/abachaa/MedQuAD"),
    "no.hub": ("", "source 'hub' reads keivalya/.* or lavita/MedQuAD, not .*no.hub"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_source_is_refused(name: str, tmp_path: Path) -> None:
    (content, message), path = UNUSABLE[name], tmp_path / name
    if content:
        path.write_text(content)
    with pytest.raises(CourseError, match=message):
        data.load(tiny(tmp_path, source=path.suffix[1:], data_path=str(path)))


@pytest.mark.parametrize("name", ["", *data.HUB])
def test_the_hub_is_read_at_a_commit_that_is_recorded(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    def download(asked: str, repo_type: str, revision: str, allow_patterns: str) -> str:
        assert (asked, repo_type) == (name or data.HUB_DATASET, "dataset")
        assert (len(revision) == 40) == ("keivalya" in asked), "no commit of lavita's is invented"
        (folder := tmp_path / "snapshots" / "c0ffee").mkdir(parents=True)
        write_table(folder / allow_patterns.replace("*", "a"), diseases(60))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    plan = tiny(tmp_path, source="hub", data_path=name)
    assert data.make(plan, plan.folder / "data")[1]["commit"] == "c0ffee"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CourseError, match=r"git clone .*source=xml.*source=sample"):
        data.load(plan)
    assert data.prepare(plan).train, "what was written needs no network"


def test_comparison_keeps_letters_marks_and_digits_of_every_script() -> None:
    for text in ("हृदय रोग", "โรคหัวใจ", "сердце 2", "心臓病", "٣ قلب"):
        assert splits.normalise(f" ({text})! ") == text
    train, test = ([row(answer=" ".join([word] * 9))] for word in ("पैर", "पोर"))
    assert splits.leakage(train, test)["8-gram"] == 0
    assert splits.normalise("Sjo\u0308gren’s hyper\u00adtension_2") == "sjögren s hypertension 2"


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


def test_repeats_are_exact_pairs_several_answers_and_shared_answers() -> None:
    pairs = [("Gout ?", "A"), ("Gout ?", "A"), ("gout", "B"), ("Mumps ?", "C"), ("Croup ?", "C")]
    rows = [row(question, answer) for question, answer in pairs]
    assert list(splits.repeats(rows).values()) == [1, 1, 4]


def test_rare_concept_or_answer_joins_diseases_and_a_common_one_does_not() -> None:
    for shared, most in (({"cui": ["C1"]}, 5), ({"answer": "the same words"}, 10)):
        assert len(set(splits.groups(diseases(most, **shared)))) == 1
        assert len(set(splits.groups(diseases(most + 1, **shared)))) == most + 1
    assert len(set(splits.groups(diseases(99, url="u")))) == 1
    nameless = [row(f"tell me about {n}", f"Answer {n}.") for n in range(3)]
    assert splits.groups([*nameless, *diseases(3)]) == [0, 0, 0, 1, 2, 3], "rows without a focus"
    assert splits.groups([*nameless, *diseases(2)]) == [0, 1, 2, 3, 4], "most rows have none"
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
    assert report.pop("boilerplate") == splits.boilerplate(everything)
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
def test_fractions_are_kept(split: Any) -> None:
    sizes = split(diseases(3000), (0.5, 0.3, 0.2)).sizes().values()
    assert [n / 3000 for n in sizes] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_group_larger_than_the_test_part_stays_in_training() -> None:
    large = [row(f"How to prevent Gout {n} ?", f"Gout {n}.", focus="Gout") for n in range(41)]
    rows = [*diseases(359), *large]
    note = "group 'gout' (41 rows) is larger than a part of 40: kept in training"
    for seed in range(5):
        split = splits.split(rows, seed=seed)
        assert [r for r in split.train if r["focus"] == "Gout"] == large
        assert split.notes == [note]
    assert splits.split(rows[:-1] + diseases(1, focus="One more")).notes == []


def test_too_few_groups_are_refused() -> None:
    for rows in ([row(focus="Asthma")] * 40, []):
        with pytest.raises(CourseError, match=f"^{len(rows)} rows in . groups .*a column focus"):
            splits.split(rows)


def test_too_few_rows_are_told_with_what_was_skipped(tmp_path: Path) -> None:
    rows = [*diseases(5), *([row(answer="")] * 18)]
    plan = tiny(tmp_path, source="jsonl", data_path=str(write_table(tmp_path / "a.jsonl", rows)))
    said = r"with seed 0\. .*Another seed may do\. .*Loaded: 5 rows of 23 records; 18 x no answer"
    with pytest.raises(CourseError, match=said):
        data.prepare(plan)


def test_rows_that_name_no_disease_are_held_out_by_question_and_answer() -> None:
    questions = [row(f"why is thing {n // 2} so?", f"Because of {n}.") for n in range(200)]
    same = [row(f"and thing {n}?", f"Because of {n // 2}.") for n in range(200, 300)]
    split = splits.split([*questions, *same])
    parts = (split.train, split.validation, split.test)
    assert min(map(len, parts)) > 10 and sum(map(len, parts)) == 300
    for a, b in combinations(parts, 2):
        for key in ("question", "answer"):
            assert not {r[key] for r in a} & {r[key] for r in b}
    (note,) = split.notes
    assert note.startswith("300 of 300 rows name no disease: they are held out by their question")
    named = [r | {"focus": f"Thing {n}"} for n, r in enumerate(questions)]
    assert splits.split(named).notes == []


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
    assert specialties.select(rows, "cardiology", least=1) == hearts
    assert specialties.select(rows, "oncology", least=1) == [growth]
    own = specialties.Specialty("gout", ("T047",))
    assert [r for r in rows if own.holds(r)] == [others[0], growth]
    crohn = row(focus="Crohn's Disease")
    assert specialties.Specialty("crohn's").holds(crohn), "a name as it is written"
    for wrong, message in (("heart", "there are cardiology"), ("cardiology", "3 rows .* too few")):
        with pytest.raises(CourseError, match=message):
            specialties.select(rows, wrong)


def test_disk_that_fills_up_loses_no_written_data(tmp_path: Path) -> None:
    plan = own_rows(tmp_path)
    data.prepare(plan)
    files.write_json(record := plan.folder / "data" / "metrics.json", {"a": 1})
    before = {p.name: p.read_bytes() for p in record.parent.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # byte 2,001 of a file fails
    try:
        with pytest.raises(CourseError, match=r"cannot write .*free space"):
            data.prepare(replace(plan, seed=1))
        with pytest.raises(CourseError, match=r"cannot write metrics\.json: .*free space"):
            files.write_json(record, [0] * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in record.parent.iterdir()} == before


def test_parquet_that_is_torn_missing_or_no_rows_says_how_to_make_it_again(tmp_path: Path) -> None:
    write_table(tmp_path / "other.parquet", [{"text": "a"}])
    write_table(tmp_path / "empty.parquet", [row(answer=None)])
    torn = write_table(tmp_path / "torn.parquet", diseases(100))
    torn.write_bytes(torn.read_bytes()[:-100])
    foreign = "its columns are not those of medquad data"
    for name, why in {"torn": "", "none": "", "other": foreign, "empty": foreign}.items():
        with pytest.raises(CourseError, match=rf"cannot read {name}\.p.*{why}.* lesson 01 again"):
            files.read_rows(tmp_path / f"{name}.parquet")


def own_rows(out: Path) -> Plan:
    """The plan for a file of one's own with 60 diseases."""
    path = write_table(out / "mine.jsonl", diseases(60))
    return tiny(out, source="jsonl", data_path=str(path))


def test_prepare_writes_once_and_reads_back_the_same(tmp_path: Path) -> None:
    plan = tiny(tmp_path)
    made = data.prepare(plan)
    folder = plan.folder / "data"
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert set(times) == {*(f"{name}.parquet" for name in PARTS), "data.json"}
    assert data.prepare(plan) == made
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times
    (folder / "test.parquet").unlink()
    assert data.prepare(plan) == made, "a part that was deleted is made again"
    part, _ = data.make(plan, folder, specialty="infectious diseases")
    assert sum(part.sizes().values()) < sum(made.sizes().values())
    assert data.prepare(plan) == made, "a specialty is not taken for the whole"


def test_files_that_no_reader_reads_do_not_make_the_rows_anew(tmp_path: Path) -> None:
    (folder := tmp_path / "MedQuAD").mkdir()
    (folder / "a.xml").write_text(DOCUMENT)
    plan = replace(tiny(tmp_path), source="xml", data_path=str(folder))
    before = data._recipe(plan)
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_text("changes at each git status")
    (folder / "LICENSE").write_text("of the data")
    assert data._recipe(plan) == before


def test_prepare_starts_again_for_another_seed_rule_or_content(tmp_path: Path) -> None:
    plan = own_rows(tmp_path)
    first, file, folder = data.prepare(plan), tmp_path / "mine.jsonl", plan.folder / "data"
    assert data.prepare(replace(plan, seed=1)).train != first.train
    assert "white space" not in data.make(plan, folder, ["white space"])[1]["cleaning"]
    assert data.prepare(plan) == first
    state, text = file.stat(), file.read_text()
    file.write_text(text.replace("Only", "Just"))  # of the same size and time
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_size == state.st_size and data.prepare(plan).train != first.train
    file.write_text(text)
    assert data.prepare(plan) == first
    before = data.identity(folder)
    files.write_rows(folder / "test.parquet", first.train)
    assert data.prepare(plan) == first, "a part that somebody changed is made again"
    assert data.identity(folder) == before != ""


@pytest.mark.parametrize("name", ["data.json", "train.parquet", "mine.parquet"])
def test_parts_replace_neither_their_input_nor_what_others_wrote(name: str, tmp_path: Path) -> None:
    mine = write_table(tmp_path / "mine.parquet", diseases(60))
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / name.replace("mine", "test")
    theirs.write_text("mine") if name != "mine.parquet" else theirs.symlink_to(mine)
    plan, before = tiny(source="parquet", data_path=str(mine)), theirs.read_bytes()
    with pytest.raises(CourseError, match=f"{theirs.name} (is there already|would replace)"):
        data.make(plan, tmp_path / "out")
    assert theirs.read_bytes() == before
    assert [p.name for p in (tmp_path / "out").iterdir()] == [theirs.name]
    with pytest.raises(CourseError, match="would replace the file that it is made from"):
        data.make(replace(plan, data_path=str(mine.rename(tmp_path / "train.parquet"))), tmp_path)


def test_parts_do_not_replace_their_input_beside_our_own_record(tmp_path: Path) -> None:
    data.make(own_rows(tmp_path), folder := tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    plan = tiny(source="parquet", data_path=str(folder / "train.parquet"))
    with pytest.raises(CourseError, match=r"train\.parquet would replace the file that it is made"):
        data.make(plan, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_question_of_a_template_needs_no_odd_space() -> None:
    asked = {
        "What are the symptoms of asthma?": "symptoms", "What is (are) asthma?": "information",
        "Is asthma inherited?": "inheritance", "who is at risk for Asthma?": "susceptibility",
        "Who is at risk for asthma? ?": "susceptibility", "What causes asthma ?": "causes",
    }  # fmt: skip
    for question, qtype in asked.items():
        number, name = splits.template_of(question) or (-1, "")
        assert (splits.TYPES[number], name.lower()) == (qtype, "asthma")
    for nameless in ("What is (are)  ?", "Who is at risk for ? ?", "How to prevent ?"):
        assert splits.template_of(nameless) is None


def test_a_write_sweeps_what_killed_ones_left_and_goes_through_no_link(tmp_path: Path) -> None:
    (link := tmp_path / "link.json").symlink_to("a.json")
    gone, alive = 2**22 + 1, os.getppid()  # no process has the first number
    for pid in (gone, alive):
        (tmp_path / f".a.json.{pid}.part").touch()
    files.write_json(file := tmp_path / "a.json", {"a": 1})
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", "link.json", f".a.json.{alive}.part"}
    with pytest.raises(CourseError, match=r"link\.json is a link"):
        files.write_json(link, {})
    assert files.read_json(file) == {"a": 1} and link.is_symlink()


def test_a_folder_is_replaced_behind_its_link_and_a_kill_between_renames_is_undone(
    tmp_path: Path,
) -> None:
    (tmp_path / "link").symlink_to("disk/folder")
    for text in "ab":
        with atomic.whole_folder(tmp_path / "link") as fresh:
            fresh.mkdir()
            (fresh / "file").write_text(text)
    folder = tmp_path / "disk" / "folder"
    assert (tmp_path / "link").is_symlink() and (folder / "file").read_text() == "b"
    folder.rename(folder.with_name(f".folder.{2**22 + 1}.old"))
    with pytest.raises(KeyError), atomic.whole_folder(folder):
        raise KeyError
    assert (folder / "file").read_text() == "b"
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]


def test_two_writers_of_one_folder_leave_one_whole_folder(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from medquad_utils import atomic\n"
        "for n in range(200):\n"
        "    with atomic.whole_folder(pathlib.Path('folder')) as fresh:\n"
        "        fresh.mkdir()\n"
        "        for name in 'ab': (fresh / name).write_text(f'{sys.argv[1]} {n}')\n"
    )
    commands = [[sys.executable, "-c", code, str(writer)] for writer in range(2)]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    writers = [subprocess.Popen(command, cwd=tmp_path, env=env) for command in commands]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    written = {(tmp_path / "folder" / name).read_text() for name in "ab"}
    assert written in ({"0 199"}, {"1 199"}), "both files are of one writer"


def test_a_folder_that_another_process_locks_is_waited_for_or_refused(tmp_path: Path) -> None:
    said = pytest.raises(CourseError, match="another run is writing to")
    with atomic.locked(tmp_path), said, atomic.locked(tmp_path, wait=False):
        pytest.fail("locked twice")
    with atomic.locked(tmp_path, wait=False):
        pass


@pytest.mark.parametrize("content", ["", "[]", "null", '{"recipe": 1}', '{"a', "[" * 99_999])
def test_a_damaged_record_is_named_with_what_to_do(content: str, tmp_path: Path) -> None:
    plan = own_rows(tmp_path)
    data.prepare(plan)
    (plan.folder / "data" / "data.json").write_text(content)
    with pytest.raises(CourseError, match=r"data/data\.json is damaged \(.*: delete it, and run"):
        data.prepare(plan)


@pytest.mark.parametrize("renamed", range(1, 4))
def test_a_kill_between_two_renames_mixes_no_parts(
    renamed: int, tmp_path: Path, monkeypatch: Any
) -> None:
    plan, real = own_rows(tmp_path), Path.replace
    made, folder = data.prepare(plan), plan.folder / "data"
    for before in ([replace(plan, seed=1)], []):
        shutil.rmtree(folder)
        [data.prepare(earlier) for earlier in before]
        calls = iter([True] * renamed)
        monkeypatch.setattr(Path, "replace", lambda *a, c=calls: real(*a) if next(c, 0) else None)
        data.prepare(plan)
        monkeypatch.undo()
        assert data.written(folder) is None, "the parts are not those of data.json"
        assert data.prepare(plan) == made, "the folder is still ours"


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
