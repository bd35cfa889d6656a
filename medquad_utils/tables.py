"""Tables as users have them: their records, named by the columns of a row.

What is not certain is not guessed. An error names the line or the record.
"""

from __future__ import annotations

import ast
import csv
import functools
import gzip
import io
import json
import re
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from medquad_utils import CourseError
from medquad_utils.files import Row

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".xlsx")  # and these with .gz
# Column of a row -> its names in files, in any case; a blank or a hyphen stands for "_".
NAMES = {
    "qtype": ("qtype", "question_type"),
    "question": ("question", "prompt", "instruction", "input"),
    "answer": ("answer", "answers", "output", "response", "completion", "long_answer",
               "reference", "references"),
    "focus": ("focus", "focus_area", "question_focus"),
    "synonyms": ("synonyms", "synonym"),
    "cui": ("cui", "cuis", "umls_cui"),
    "semantic_type": ("semantic_type", "semantic_types", "umls_semantic_types"),
    "source": ("source", "document_source"),
    "url": ("url", "document_url"),
    "document_id": ("document_id",),
}  # fmt: skip
CHATS = ("messages", "conversations")
KNOWN = {*CHATS, *chain(*NAMES.values())}
ROLES = {"user": "question", "human": "question", "assistant": "answer", "gpt": "answer"}
CONTROL = re.compile(  # control characters, direction marks, surrogates; tabs and newlines stay
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
# Bytes that cp1252 would misread: a letter in UTF-8, and the apostrophe of old Macs.
NOT_CP1252 = re.compile(rb"[\xc2-\xde][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[a-z]\xd5[a-z]")
FOREIGN = {  # how files begin that are not the table which their ending promises
    b"version https://git-lfs": "it is a Git LFS pointer, not the data: run git lfs pull",
    b"<": "it is a web page or XML: download the table itself",
}
ZIP = b"PK\x03\x04"  # so does an Excel file
Error = (OSError, ValueError, EOFError, KeyError, RecursionError, zlib.error, zipfile.BadZipFile)


def list_files(path: Path, endings: Collection[str]) -> list[Path]:
    """List the file, or the files below a folder, that have one of the endings, in any case."""
    # Hidden files and folders are left out: macOS and Jupyter keep copies in some.
    below = sorted(path.rglob("*")) if path.is_dir() else [path]
    shown = (f for f in below if not any(p.startswith(".") for p in f.relative_to(path).parts))
    return [file for file in shown if file.is_file() and _ending(file) in endings]


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read(file: Path) -> tuple[list[Row | None], list[str]]:
    """Read the records of a file by the columns ``NAMES``, and notes on what is unusual about it.

    A chat of more than one question and its answer is ``None``. A file that cannot be read without
    a guess raises a CourseError.
    """
    notes, ending = list[str](), _ending(file)
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        if told := [FOREIGN[head] for head in FOREIGN if raw[:99].lstrip().startswith(head)]:
            raise ValueError(told[0])
        if ending != ".xlsx" and raw.startswith(ZIP):
            raise ValueError("it is a zip archive or an Excel file: unpack it, or call it .xlsx")
        if ending in (".xlsx", ".parquet"):
            records = (_excel if ending == ".xlsx" else _parquet)(raw)
        else:
            text, encoding = _decoded(raw)
            if not encoding.startswith("utf-8"):
                notes.append(f"{file.name} is not in UTF-8: read as {encoding}")
            records = (_csv if ending in (".csv", ".tsv") else _json)(text)
        if unread := sorted({name for record in records for name in record} - KNOWN - {""}):
            notes.append(f"{file.name} has columns that are not read: {', '.join(unread)}")
        if _repeat_an_instruction(records):
            notes.append(f"{file.name} repeats one instruction: the questions are the inputs")
            records = [record | {"instruction": ""} for record in records]
        return _named([_unfolded(record) for record in records]), notes
    except Error as error:
        why, todo = str(error), "or save the table again as .csv or .jsonl in UTF-8"
        if isinstance(error, OSError) and error.strerror:  # the system's, not one of gzip
            why, todo = error.strerror, "or give another file"
        why = " ".join(why.split()).rstrip(".")
        raise CourseError(f"cannot read {file.name}: {why}. Correct that, {todo}.") from error


def _repeat_an_instruction(records: Sequence[Row]) -> bool:
    """Say whether "Answer as a doctor" or the like is before every input: no part of a question."""
    told = {str(record.get("instruction")) for record in records}
    alike = told != {"None"} and len(told) == 1 < len(records)
    return alike and all(record.get("input") for record in records)


def _decoded(raw: bytes) -> tuple[str, str]:
    """Decode a text: Unicode as its first bytes say, UTF-8 without them, else cp1252 (Windows)."""
    encoding = json.detect_encoding(raw)
    with suppress(UnicodeDecodeError):
        return raw.decode(encoding), encoding
    if encoding == "utf-8" and not NOT_CP1252.search(raw):
        with suppress(UnicodeDecodeError):
            return raw.decode("cp1252"), "cp1252"
    line = raw.decode(encoding, "replace").partition("\ufffd")[0].count("\n") + 1
    raise ValueError(f"line {line} has bytes that are no text in {encoding.upper()} or cp1252")


@functools.cache
def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name.lower()).strip("_")


def _keys(names: Iterable[Any], where: str = "the header") -> list[str]:
    """Return the plain names of columns, none of them twice."""
    keys = [_plain(name) if isinstance(name, str) else "" for name in names]
    if twice := [key for key, count in Counter(keys).items() if key and count > 1]:
        raise ValueError(f"{where} has the column {twice[0]!r} twice: delete or rename one")
    return keys


def _dicts(rows: Sequence[Sequence[Any]]) -> list[Row]:
    """Make records of rows, the first of which is the header."""
    keys = _keys(rows[0]) if rows else []
    return [dict(zip(keys, row, strict=True)) for row in rows[1:]]


def _csv(text: str) -> list[Row]:
    """Read a table with commas, semicolons, tabs or bars, strictly."""
    csv.field_size_limit(1 << 30)  # answers can be longer than the default of 128 KiB
    if re.match(r"\s*[\[{]", text):
        raise ValueError("it is JSON: give its name the ending .json")
    hint = re.match(r"sep=(.)(?=[\r\n])", text)  # a first line for Excel
    text = text[hint.end() :] if hint else text
    head = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    names = {mark: map(_plain, head.split(mark)) for mark in ",;\t|"}
    mark = hint[1] if hint else max(names, key=lambda mark: len(KNOWN.intersection(names[mark])))
    rows, line = list[list[str]](), 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        for cells in reader:
            if rows and cells and len(cells) != len(rows[0]):
                raise ValueError(
                    f"the row in line {line} has {len(cells)} cells, and the header {len(rows[0])} "
                    f"({', '.join(rows[0])}). Put text that holds {mark!r} into double quotes"
                )
            if rows and cells == rows[0]:
                raise ValueError(f"line {line} repeats the header: delete it")
            if any(cells):
                rows.append(cells)
            line = reader.line_num + 1
    except csv.Error as error:
        advice = "A quote is not closed, or one inside a cell is not written twice"
        raise ValueError(f"the row in line {line}: {error}. {advice}") from error
    return _dicts(rows)


def _json(text: str) -> list[Row]:
    """Read objects: in a list, one on each line, or one after the other."""
    values, decoder, end = list[Any](), json.JSONDecoder(object_pairs_hook=_object), 0
    space = re.compile(r"\s*")
    while (start := space.match(text, end).end()) < len(text):  # type: ignore[union-attr]
        value, end = decoder.raw_decode(text, start)
        values += value if isinstance(value, list) else [value]
    if wrong := [n for n, value in enumerate(values) if not isinstance(value, dict | tuple)]:
        raise ValueError(f"record {wrong[0] + 1} is not an object: {str(values[wrong[0]])[:60]}")
    keys = [_keys(value, f"record {n}") for n, value in enumerate(values, start=1)]
    return [dict(zip(k, v.values(), strict=True)) for k, v in zip(keys, values, strict=True)]


def _object(pairs: list[tuple[str, Any]]) -> Row | tuple[str, ...]:
    """Return an object, or a tuple of its keys if one stands twice, which ``_keys`` refuses."""
    names = [key for key, _ in pairs if _plain(key)]
    return dict(pairs) if len({*names}) == len(names) else tuple(names)


def _parquet(raw: bytes) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw)).read()
    cells = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return _dicts([table.column_names, *cells])


def _excel(raw: bytes) -> list[Row]:
    """Read the only sheet of an Excel file that has cells."""
    import pandas

    try:
        read = pandas.read_excel(
            io.BytesIO(raw), sheet_name=None, header=None, engine="openpyxl", keep_default_na=False
        )  # without it, the text NA would be an empty cell
    except ImportError as error:
        raise ValueError("it takes openpyxl: pip install 'medquad-qlora[excel]'") from error
    sheets = {str(name): frame.values.tolist() for name, frame in read.items() if len(frame)}
    if len(sheets) > 1:
        raise ValueError(f"it has {len(sheets)} sheets ({', '.join(sheets)}): keep one of them")
    return _dicts(next(iter(sheets.values()), []))


def _named(records: Sequence[Row | None]) -> list[Row | None]:
    """Name the values of records by the columns of a row."""
    present = {name for record in records for name in record or ()}
    for column in ("question", "answer"):
        if present and not present.intersection(NAMES[column]):
            raise ValueError(
                f"no column for the {column}: expected {', '.join(NAMES[column])}; found "
                f"{', '.join(sorted(present)[:12])}. Rename one"
            )
    return [record and _picked(record, number) for number, record in enumerate(records, start=1)]


def _picked(record: Row, number: int) -> Row:
    found = {c: [name for name in names if name in record] for c, names in NAMES.items()}
    for column, names in found.items():
        if len(names) > 1:
            both = " and ".join(map(repr, names))
            raise ValueError(f"record {number} has {both} for the {column}: delete or rename one")
    return {column: record[names[0]] for column, names in found.items() if names}


def _unfolded(record: Row) -> Row | None:
    """Unfold a chat, or an instruction with its input, to a question and its answer.

    A longer chat is ``None``.
    """
    if {"instruction", "input"} <= record.keys():
        parts = (record["instruction"], record.pop("input"))
        texts = [part for part in parts if isinstance(part, str) and part.strip()]
        record["instruction"] = "\n".join(texts)
    chats = [record[name] for name in CHATS if name in record]
    if isinstance(prompt := record.get("prompt"), list):  # the way of TRL
        chats = [[*prompt, *(record.get("completion") or ())]]
    if not chats:
        return record
    said = []
    for turn in chats[0] if isinstance(chats[0], list) else ():
        if isinstance(turn, dict) and (role := str(turn.get("role", turn.get("from")))) != "system":
            said.append((ROLES.get(role, role), turn.get("content", turn.get("value"))))
    if [role for role, _ in said] != ["question", "answer"]:
        return None
    others = record.keys() - {*NAMES["question"], *NAMES["answer"]}
    return {name: record[name] for name in others} | dict(said)


def clean_text(text: str) -> str:
    """Strip a text, compose its letters (NFC), remove control characters and surrogates."""
    text = CONTROL.sub(lambda match: " " if match[0].isspace() else "", text)
    return unicodedata.normalize("NFC", text).strip()


def has_words(text: str) -> bool:
    """Return whether a text holds a letter or a digit: signs alone say nothing."""
    return any(map(str.isalnum, text))


def texts(value: Any) -> list[str] | None:
    """List the texts in a cell: a text, a list, or a list written as text. Else return ``None``."""
    values = value if isinstance(value, list) else [value]
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        values = _written_list(value)
        if values == [value] and value[1:2] in ("'", '"'):
            return None  # it begins as a list of texts and is none, such as numpy's ['a' 'b']
    values = [v for v in values if v is not None and v == v]  # NaN differs from itself
    return values if all(isinstance(v, str) for v in values) else None


def _written_list(text: str) -> list[Any]:
    """Read a list that JSON or pandas wrote; any other text is the only one."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            values = read(text)
            # Python takes numpy's ['a' 'b'] for ['ab']; repr tells the two apart.
            if read is json.loads or repr(values) == text:
                return list(values)
    return [text]
