"""The words: spelling, terms and where they are explained, numbers and what holds them, references, messages that the pages quote."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import re
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from spellchecker import SpellChecker

from medquad_utils import data, estimate, memory, profiles, quantization

REPO = Path(__file__).parent.parent
TESTS = REPO / "tests"
NOTEBOOKS = sorted((REPO / "notebooks").glob("0*_*.ipynb"))
LESSONS = {path.stem: path for path in NOTEBOOKS}
MARKDOWN = [REPO / "README.md", REPO / "Colab.md", *sorted((REPO / "notebooks").glob("*.md"))]
PAGES = [*NOTEBOOKS, *sorted((REPO / "notebooks" / "solutions").glob("*.ipynb")), *MARKDOWN]
MODULES = sorted((REPO / "medquad_utils").rglob("*.py"))

ADDRESS = r"https?://\S+|\b[\w-]+(?:\.[\w-]+)+/[\w/.-]+"
CODE = (r"```.*?```", r"``[^`]*``", r"`[^`]*`", r"\$\$.*?\$\$", r"\$[^$\n]*\$", r"<!--.*?-->", r"<[^<>\n]+>", r"\]\([^)]*\)", ADDRESS)


@cache
def cells(path: Path) -> list[tuple[str, str]]:
    """Kind and source of each cell; a page of markdown is one cell."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return [("markdown", text)]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]


def prose(markdown: str) -> str:
    """The words of markdown: no code, mathematics, HTML or addresses; the words of a link stay."""
    for pattern in CODE:
        markdown = re.sub(pattern, " ", markdown, flags=re.DOTALL)
    return markdown


def text_of(path: Path) -> str:
    return "\n\n".join(source for kind, source in cells(path) if kind == "markdown")


# ---- spelling -------------------------------------------------------------------------------------------------------

AMERICAN = (  # the forms, not every one there is
    r"(?:de)?quantiz\w+|colors?|behaviors?|favor\w*|neighbors?|normaliz\w+|special(?:iz\w+|ty's)|recogniz\w+|optimiz(?:e|ed|es|ing|ation)|"
    r"initializ\w+|organiz\w+|tokeniz(?:e|ed|es|ing|ation)|summariz\w+|generaliz\w+|analyz\w+|centers?|catalogs?|gray|labeling|"
    r"modeling|canceled|traveled|fulfill(?:s|ment)?|defense|artifacts?"
)


def comments(path: Path) -> str:
    """Docstrings and comments of a module."""
    source = path.read_text(encoding="utf-8")
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    found = [ast.get_docstring(node) or "" for node in nodes]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found += [t.string for t in tokens if t.type == tokenize.COMMENT and not t.string.startswith(("# noqa", "# type", "# fmt"))]
    return "\n".join(found)


def words(text: str) -> Iterator[str]:
    """Plain words in lower case: names with digits, points, underlines or inner capitals are not prose."""
    for token in re.findall(r"[^\s\"“”()\[\],;:!?*…|/·]+", prose(text)):
        for word in re.split(r"[-–]", token.strip(".'’`")):
            word = word.removesuffix("'s").removesuffix("’s").replace("’", "'")
            if re.fullmatch(r"[A-Z]?[a-zà-ÿ]+(?:'[a-z]+)?", word):
                yield word.lower()


@cache
def used() -> dict[str, str]:
    """Each word in use, and a file that uses it."""
    every = {path: text_of(path) for path in PAGES} | {path: comments(path) for path in MODULES}
    return {word: path.name for path, text in every.items() for word in words(text)}


@cache
def own_words() -> list[str]:
    return (TESTS / "words.txt").read_text(encoding="utf-8").split()


def misspelt(found: dict[str, str]) -> dict[str, str]:
    unknown = SpellChecker(language="en", distance=1).unknown(found)
    return {word: found[word] for word in sorted(unknown) if word not in own_words() and len(word) > 1}


def test_every_word_of_prose_is_english_or_in_the_list_of_the_courses_own_words() -> None:
    assert misspelt(used()) == {}, "mend them, or add them to tests/words.txt"


def test_a_misspelt_word_is_found() -> None:
    assert misspelt(dict.fromkeys(words("An adaptor that **traims** `not_this` and NF4 and [linkk](a.md)."), "x")) == {
        "linkk": "x",
        "traims": "x",
    }


def test_the_list_of_words_is_sorted_without_duplicates_and_in_use() -> None:
    assert own_words() == sorted(set(own_words()))
    english = SpellChecker(language="en", distance=1)
    assert [w for w in own_words() if w not in used() or w in english] == [], "no longer in use, or an English word already"


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_prose_has_british_spelling(path: Path) -> None:
    text = text_of(path) if path in PAGES else comments(path)
    text = re.sub(r"\*[^*\n]*\*, \[|^# noqa.*$", " ", text.split("## Further reading")[0], flags=re.MULTILINE)
    found = re.findall(rf"(?<![\w.=\"'])(?:{AMERICAN})(?![\w=(\"'])", prose(text), re.IGNORECASE)
    assert found == []


def test_american_spelling_is_found() -> None:
    assert re.findall(rf"\b(?:{AMERICAN})\b", "You quantize in colors; you quantise in colours.", re.IGNORECASE) == ["quantize", "colors"]


# ---- terms ----------------------------------------------------------------------------------------------------------

EMPHASIS = re.compile(r"\*\*(.+?)\*\*|(?<![\w*])\*([^*\s][^*]*?)\*(?![\w*])", re.DOTALL)


def glossary() -> dict[str, tuple[str, str, str]]:
    """Term -> the lesson and the section that define it, and what the glossary says: ``- **term**: words [0N, section](file)``."""
    entries: dict[str, tuple[str, str, str]] = {}
    for line in (REPO / "notebooks" / "GLOSSARY.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("- "):
            found = re.fullmatch(r"- \*\*(.+?)\*\*: (.+) \[0\d, ([^\]]+)\]\((0\d_\w+)\.ipynb\)", line)
            assert found, f"not of the form of an entry: {line}"
            assert found[1] not in entries, f"twice: {found[1]}"
            entries[found[1]] = (found[4], found[3], found[2])
    return entries


def told(every: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The cells of a lesson, its exercises and its reading made empty: what they name and give is theirs."""
    text, kept = True, []
    for kind, source in every:
        before, mark, _ = source.partition("## Exercises") if kind == "markdown" else (source, "", "")
        text = not mark and (text or "## What you learned" in source)
        kept.append((kind, re.sub(r"(?s)## Further reading.*", "", source) if text else before if mark else ""))
    return kept


def plain(text: str) -> str:
    return re.sub(r"[^\w-]+", " ", text.lower()).strip()


def emphasised(every: list[tuple[str, str]]) -> set[str]:
    """What a lesson marks, but labels: they end in a mark of punctuation."""
    lesson = "\n\n".join(source for kind, source in told(every) if kind == "markdown")
    found = {" ".join((bold or italic).split()) for bold, italic in EMPHASIS.findall(prose(lesson))}
    return {mark for mark in found if mark[-1] not in ".:?" and not re.match(r"(You|Exercise|Predict) ?", mark)}


def stressed() -> set[str]:
    """Phrases that are marked for their weight, not for being new."""
    return set(tomllib.loads((TESTS / "words.toml").read_text(encoding="utf-8"))["stressed"])


def names(term: str) -> list[str]:
    """``KL divergence (KL)`` and ``prompt, completion`` have two names each."""
    return [plain(name) for name in re.split(r"[,()]", term) if name.strip()]


@cache
def sections(lesson: str) -> dict[str, str]:
    """Heading without marks -> what stands under it, code too; what comes before the first is "the opening"."""
    text = "\n\n".join(source if kind == "markdown" else re.sub(r"(?m)^#", "", source) for kind, source in cells(LESSONS[lesson]))
    opening, *parts = re.split(r"^##+ (.+)$", text, flags=re.MULTILINE)
    return {"the opening": opening} | {re.sub("[`*]", "", head): part for head, part in zip(parts[::2], parts[1::2], strict=True)}


def test_every_entry_of_the_glossary_names_a_lesson_in_which_the_term_occurs_and_no_earlier_lesson_marks_it() -> None:
    listed = glossary()
    assert len(listed) > 60
    assert list(listed) == sorted(listed, key=str.lower), "in the order of the alphabet"
    marked = {stem: {plain(mark) for mark in emphasised(cells(path)) - stressed()} for stem, path in LESSONS.items()}
    for term, (lesson, section, meaning) in listed.items():
        assert len(meaning.split()) >= 4, term
        text = plain(sections(lesson)[section])
        assert any(name in text for name in names(term)), f"{section!r} of {lesson} has no word of {term!r}"
        for earlier in sorted(LESSONS)[: sorted(LESSONS).index(lesson)]:
            assert not marked[earlier] & set(names(term)), f"{term!r} is defined in {earlier} already"


def test_every_marked_term_is_in_the_glossary() -> None:
    known = {name for term in glossary() for name in names(term)}
    known |= {f"{name}s" for name in known}
    marked = {mark: stem for stem, path in LESSONS.items() for mark in emphasised(cells(path))}
    assert {mark: stem for mark, stem in marked.items() if plain(mark) not in known and mark not in stressed()} == {}
    assert stressed() - set(marked) == set(), "marked in no lesson"


def test_a_marked_term_and_a_label_are_told_apart() -> None:
    text = "**What we see:** a *scale* and `**not code**` and **two\nwords**. 2 * 3 * 4\n## Exercises\n*x*"
    assert emphasised([("markdown", text), ("markdown", "*y*")]) == {"scale", "two words"}


# ---- numbers --------------------------------------------------------------------------------------------------------

NUMBER = r"(?<![\w.·%-])-?\d[\d,]*\d(?:\.\d+)?(?![\w])|(?<![\w.·%-])-?\d(?:\.\d+)?(?![\w])"
NOT_A_NUMBER = (
    r"^#[^\n]*$", r"^\d+\. ", r"^\*\*You need[^\n]*$", r"^- \*\*You need[^\n]*$",  # headings, numbers of lists, the stamp's own line
    r"Llama[- ]3[\w.-]*|CC BY 4\.0|127\.0\.0\.1|8-grams?|[Ll]essons? \d\d(?:(?:, | and | to )\d\d)*|[Ss]ections? \d+(?: and \d+)?",  # names
)  # fmt: skip


def of_words(markdown: str) -> str:
    """Prose without what is no number, its white space made one."""
    text = prose(re.sub(r"!?\[[^\]]*\]\([^)]*\)", " ", markdown))
    for pattern in NOT_A_NUMBER:
        text = re.sub(pattern, " ", text, flags=re.MULTILINE)
    return " ".join(text.split())


def literals(source: str) -> set[float]:
    """The numbers that code holds; 1e-4 and 16_407 count as what they are."""
    plain_code = re.sub(r"(?m)^(\s*)%.*$", r"\1pass", source)
    numbers = [n.value for n in ast.walk(ast.parse(plain_code)) if isinstance(n, ast.Constant) and isinstance(n.value, int | float)]
    return {float(number) for number in numbers}


def value(number: str) -> float:
    return float(number.replace(",", ""))


def in_tests(*files: str) -> set[float]:
    """The numbers that tests assert on the real MedQuAD."""
    return set().union(*(literals((TESTS / file).read_text(encoding="utf-8")) for file in files))


def gib(other_bits: int) -> float:
    """What the weights of the 8 B Llama take in GiB with 4-bit linear layers and the others in so many bits."""
    return sum(quantization.model_memory_gb(LLAMA, quantization.bits_per_parameter(True), other_bits).values()) * 1e9 / 2**30


LLAMA = profiles.PROFILES["llama-8b"].shape
CARDS = {name: card.memory_gb for name, card in estimate.CARDS.items()}
NAMES = {
    "memory": memory,
    "quantization": quantization,
    "llama": LLAMA,
    "in_tests": in_tests,
    "sum": sum,
    "round": round,
    "gib": gib,
    "cards": CARDS,
}


@cache
def table() -> dict[str, dict[str, str]]:
    """Lesson (or ``all``) -> phrase -> what holds its numbers."""
    return tomllib.loads((TESTS / "words.toml").read_text(encoding="utf-8"))["numbers"]


def held(phrase: str, by: str) -> bool:
    """Whether the numbers of a phrase are those of an expression, or stand in a source that can be looked up."""
    if by == "name" or re.match(r"source: .{10}", by):
        return True
    found = eval(by, {"__builtins__": {}}, NAMES)
    written = re.findall(NUMBER, phrase)
    if isinstance(found, set):
        return bool(written) and all(value(number) in found for number in written)
    given = found if isinstance(found, tuple) else (found,)
    decimals = [len(number.partition(".")[2]) for number in written]
    return len(given) == len(written) and all(round(float(g), d) == value(n) for g, n, d in zip(given, written, decimals, strict=True))


def loose(lesson: str, every: list[tuple[str, str]]) -> list[str]:
    """Numbers of a lesson's prose that neither the code beside them nor the table holds, with the words around them."""
    found = []
    code = [literals(source) if kind == "code" else set() for kind, source in every]
    for place, (kind, source) in enumerate(told(every)):
        text = of_words(source) if kind == "markdown" else ""
        beside = set().union(*code[max(place - 2, 3) : place + 4])
        for phrase in sorted({**table()["all"], **table().get(lesson, {})}, key=len, reverse=True):
            text = text.replace(phrase, " ~ ")
        for number in re.finditer(NUMBER, text):
            if abs(value(number[0])) not in beside:
                found.append(text[max(0, number.start() - 40) : number.end() + 30])
    return found


@pytest.mark.parametrize("lesson", sorted(LESSONS))
def test_every_number_in_prose_is_held_by_code_beside_it_or_by_the_table(lesson: str) -> None:
    assert loose(lesson, cells(LESSONS[lesson])) == []


@pytest.mark.parametrize("lesson", ["all", *sorted(LESSONS)])
def test_every_entry_of_the_table_is_true_and_in_use(lesson: str) -> None:
    texts = [
        of_words(source) for stem in LESSONS if lesson in ("all", stem) for kind, source in told(cells(LESSONS[stem])) if kind == "markdown"
    ]
    for phrase, by in table().get(lesson, {}).items():
        assert any(phrase in text for text in texts), f"no lesson says {phrase!r}"
        assert held(phrase, by), f"{phrase!r} is not {by}"


def test_a_wrong_and_an_uncovered_number_are_found() -> None:
    assert held("41,943,040 in 7 kinds of layer", "memory.adapter_parameters(llama, 16), 7")
    assert not held("41,943,040 in 8 kinds", "memory.adapter_parameters(llama, 16), 7")
    assert not held("from 5 to 7", "5")
    assert not held("4,711", "in_tests('test_data.py')")
    pages = [("code", "pass")] * 4 + [("markdown", "It took 4,711 steps, not 12."), ("code", "n = 12")]
    assert [text[-30:] for text in loose("09_specialise", pages)] == ["It took 4,711 steps, not 12."]


def test_what_lesson_01_says_of_repeats_is_so_in_the_real_medquad(real_rows: list[dict[str, Any]]) -> None:
    pairs = [(row["question"], row["answer"]) for row in real_rows]
    answers: dict[str, set[str]] = {}
    for question, answer in pairs:
        answers.setdefault(data.normalise(question), set()).add(answer)
    shared = Counter(answer for _, answer in pairs)
    assert len(pairs) - len(set(pairs)) == 48
    assert sum(len(several) > 1 for several in answers.values()) == 1437
    assert sum(n for n in shared.values() if n > 1) == 674


# ---- references -----------------------------------------------------------------------------------------------------

ARXIV = re.compile(r"\[arXiv\s+(\d{4}\.\d{4,5})\]\(https://arxiv\.org/abs/(\d{4}\.\d{4,5})\)")


@pytest.mark.parametrize("path", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_references_are_named_and_well_formed(path: Path) -> None:
    text = text_of(path)
    assert re.findall(r"http://(?!127\.0\.0\.1|8-grams?|localhost)\S+", re.sub(r"`[^`]*`", "", text)) == []
    assert len(re.findall(r"arxiv\.org", text)) == len(ARXIV.findall(text)), "expected [arXiv 0000.00000](https://arxiv.org/abs/0000.00000)"
    for shown, address in ARXIV.findall(text):
        assert shown == address and 1 <= int(shown[2:4]) <= 12
    for doi in re.findall(r"doi\.org/([^)\s]*)", text):
        assert re.fullmatch(r"10\.\d{4,}/[\w.()/-]+", doi)
    for name, _ in re.findall(r"(?<!!)\[([^\]]*)\]\((https://[^)\s]+)\)", text):
        assert len(name.strip("![ ")) > 3, f"a link without a name in {path.name}"


def test_one_paper_has_one_title() -> None:
    titles: dict[str, set[str]] = {}
    for path in NOTEBOOKS:
        for title, number in re.findall(r"\*([^*]+)\*[^\[*]*\[arXiv\s+(\d{4}\.\d{5})\]", text_of(path)):
            titles.setdefault(number, set()).add(plain(title).split()[0])
    assert {number: found for number, found in titles.items() if len(found) > 1} == {}
    assert len(titles) > 20


# ---- messages -------------------------------------------------------------------------------------------------------


def errors() -> list[tuple[str, str]]:
    """Who says it (ours or a library), and the message, of each entry of ERRORS.md; ``...`` stands for what differs."""
    text = (REPO / "notebooks" / "ERRORS.md").read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return [(part.splitlines()[0], message) for part in parts for message in re.findall(r"^### `(.+)`$", part, re.MULTILINE)]


@cache
def said() -> str:
    """All text that the package may say: its strings, one after the other, with ``\\0`` for what is filled in."""
    every = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                every.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                every.append(node.value)
    return "\n".join(every)


def missing(message: str) -> list[str]:
    return [piece for piece in map(str.strip, message.split("...")) if piece and piece not in said()]


def test_the_page_of_errors_quotes_messages_that_the_package_says() -> None:
    ours = [message for who, message in errors() if who.startswith("From the course")]
    assert len(errors()) >= 20 and len(ours) >= 10
    assert Counter(message for _, message in errors()).most_common(1)[0][1] == 1
    assert {message: missing(message) for message in ours if missing(message)} == {}
    assert missing("no adapter in .../: somebody reworded this") != []


LIBRARIES = {
    "IProgress not found. Please update jupyter and ipywidgets.": "tqdm/notebook.py",
    "You are trying to access a gated repo.": "transformers/utils/hub.py",
    "Attempting to unscale FP16 gradients.": "torch/amp/grad_scaler.py",
    "Your setup doesn't support bf16/gpu.": "transformers/training_args.py",
    "Asking to pad but the tokenizer does not have a padding token.": "transformers/tokenization_utils_base.py",
    "not available in CPU-only version of bitsandbytes.": "bitsandbytes/cextension.py",
    "Kernel is running over TCP without encryption.": "ipykernel/kernelapp.py",
}


@pytest.mark.parametrize("message", LIBRARIES)
def test_a_quoted_message_of_a_library_is_in_the_installed_one(message: str) -> None:
    package, _, file = LIBRARIES[message].partition("/")
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin
    assert message in (Path(spec.origin).parent / file).read_text(encoding="utf-8")
    assert message in [quoted for who, quoted in errors() if not who.startswith("From the course")]


def test_every_error_has_a_cause_and_a_way_out() -> None:
    text = (REPO / "notebooks" / "ERRORS.md").read_text(encoding="utf-8")
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        assert "**Why**" in part and "**Way out**" in part, part.splitlines()[0]


def test_readme_and_colab_lead_to_both_pages() -> None:
    for page in ("README.md", "Colab.md"):
        text = (REPO / page).read_text(encoding="utf-8")
        assert "notebooks/ERRORS.md" in text
    assert "notebooks/GLOSSARY.md" in (REPO / "README.md").read_text(encoding="utf-8")
