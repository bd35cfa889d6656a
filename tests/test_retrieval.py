"""Search in the archive: both rankings, their fusion, the score and its threshold, and the index as files."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medquad_utils import data, retrieval
from medquad_utils.assets import sample
from medquad_utils.data import COLUMNS, Row, focus_of
from medquad_utils.profiles import CourseError
from medquad_utils.retrieval import Hit, Index, TfidfIndex, calibrate, error_rates, probes, reciprocal_ranks, words


def row(focus: str | None, question: str, answer: str, **known: Any) -> Row:
    return {**dict.fromkeys(COLUMNS), "qtype": "causes", "focus": focus, "question": question, "answer": answer, **known}


TOY = [
    row("Asthma", "What causes Asthma ?", "Pollen, smoke and cold air narrow the airways.", synonyms=["Bronchial asthma"]),
    row("Asthma", "What are the treatments for Asthma ?", "Inhalers widen the airways; smoke makes asthma worse.", qtype="treatment"),
    row("Gout", "What causes Gout ?", "Crystals of uric acid in a joint. Asthma is not a cause of gout.", synonyms=["Gouty arthritis"]),
    row("Hepatitis C", "What causes Hepatitis C ?", "A virus in the blood."),
    row("Hepatitis B", "What causes Hepatitis B ?", "Another virus in the blood."),
    row("Reactive arthritis", "What causes Reactive arthritis ?", "An infection elsewhere in the body.", synonyms=["Reiter's syndrome"]),
]


@pytest.fixture(scope="module")
def toy() -> Index:
    return Index(TOY)


@pytest.fixture(scope="module", params=[Index, TfidfIndex])
def archive(request: pytest.FixtureRequest) -> Index | TfidfIndex:
    return request.param(TOY)


def found(hits: list[Hit]) -> list[str | None]:
    return [hit.row["focus"] for hit in hits]


# ---- words, ranks, BM25 ---------------------------------------------------------------------------------------------


def test_single_letters_count_and_letters_that_upstream_deleted_do_not() -> None:
    assert words("Is Hepatitis C like type 1? Is it?") == ["is", "hepatitis", "c", "like", "type", "1", "it"]
    assert words("Sjögren’s") == words("Sjgren's") == ["sjgrens"]
    assert words("哮喘 \x00\x1b ?!") == []


@pytest.mark.parametrize(
    ("scores", "depth", "ranks"),
    [
        ([3.0, 1.0, 2.0, 0.0], 10, [1, 3, 2, None]),
        ([2.0, 2.0, 1.0, 2.0], 10, [1, 1, 4, 1]),  # equals share a rank, the next one counts them all
        ([5.0, 3.0, 4.0, 1.0], 2, [1, None, 2, None]),
        ([0.0, 0.0], 1, [None, None]),
    ],
)
def test_reciprocal_ranks_by_hand(scores: list[float], depth: int, ranks: list[int | None]) -> None:
    expected = [1 / (60 + rank) if rank else 0.0 for rank in ranks]
    assert reciprocal_ranks(numpy.array(scores), depth).tolist() == expected


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_reciprocal_ranks_count_the_better_ones(scores: list[int]) -> None:
    expected = [1 / (61 + sum(other > s for other in scores)) if s else 0.0 for s in scores]
    assert reciprocal_ranks(numpy.array(scores, dtype=numpy.float32)).tolist() == expected


def brute_bm25(documents: list[list[str]], question: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """BM25 as Lucene has it, written from the formula."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        total = 0.0
        for word in question:
            holding = sum(word in d for d in documents)
            often = document.count(word)
            if often:
                idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
                total += idf * often / (often + k1 * (1 - b + b * len(document) / mean))
        scores.append(total)
    return scores


@pytest.mark.parametrize("question", ["asthma smoke", "what causes gout", "a virus", "zzz", ""])
def test_bm25_is_the_formula(question: str) -> None:
    texts = [retrieval.plain(r["question"] + " " + r["answer"]) for r in TOY]
    index = retrieval._bm25(texts)
    got = index.get_scores_from_ids(index.get_tokens_ids(words(question)))
    documents = [retrieval.re.findall(r"\w+", text) for text in texts]
    assert got == pytest.approx(brute_bm25(documents, words(question)), abs=1e-5)


def brute_search(rows: list[Row], question: str, barred: set[int] = frozenset()) -> list[tuple[int, float]]:  # type: ignore[assignment]
    """Row numbers and scores, best first, for an archive of at most 20 rows: everything once more, without the library."""
    asked = words(question)
    names = [[set(words(n)) for n in [r["focus"], *(r["synonyms"] or [])]] for r in rows]
    headings = [words(" ".join([r["question"], r["focus"], *(r["synonyms"] or [])])) for r in rows]
    wholes = [h + retrieval.re.findall(r"\w+", retrieval.plain(r["answer"])) for h, r in zip(headings, rows, strict=True)]
    fused, ranked = [0.0] * len(rows), []
    for documents in (headings, wholes):
        scores = [0.0 if n in barred else round(s, 5) for n, s in enumerate(brute_bm25(documents, asked))]
        ranked.append(scores)
        fused = [f + (1 / (61 + sum(other > s for other in scores)) if s else 0) for f, s in zip(fused, scores, strict=True)]

    def idf(word: str) -> float:
        holding = sum(word in w for w in wholes)
        return math.log(1 + (len(rows) - holding + 0.5) / (holding + 0.5))

    def asked_weight(word: str) -> float:
        holding = sum(word in w for w in wholes)
        return idf(word) * (sum(any(word in n for n in ns) for ns in names) / holding if holding else 1)

    def score(number: int) -> float:
        shares = [
            sum(map(asked_weight, n.intersection(asked))) * sum(map(idf, n.intersection(asked))) / sum(map(idf, n)) for n in names[number]
        ]
        whole = sum(map(asked_weight, asked))
        return max(shares) / whole if whole else 0.0

    order = sorted((n for n in range(len(rows)) if fused[n]), key=lambda n: (-round(score(n), 9), -ranked[0][n], -fused[n], n))
    return [(n, score(n)) for n in order]


@pytest.mark.parametrize(
    ("question", "barred"),
    [
        ("What causes asthma?", set()),
        ("bronchial asthma", {0}),
        ("arthritis of a joint", set()),
        ("can smoke cause gouty arthritis", set()),
        ("hepatitis c virus", {4}),
        ("zxyzitis and asthma", set()),
        ("in the blood", set()),
    ],
)
def test_search_is_both_rankings_fused_and_ordered_by_score(toy: Index, question: str, barred: set[int]) -> None:
    hits = toy.search([question], k=20, without=[barred])[0]
    expected = brute_search(TOY, question, barred)
    assert [hit.row for hit in hits] == [TOY[n] for n, _ in expected]
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected])


def test_the_score_by_hand(toy: Index) -> None:
    """Of six rows two have asthma in a name and one more in its answer; none has "zxyzitis"."""
    asthma, unknown = math.log(1 + 3.5 / 3.5), math.log(1 + 6.5 / 0.5)
    assert toy.search(["asthma"])[0][0].score == 1.0
    naming = asthma * 2 / 3
    assert toy.search(["zxyzitis asthma"])[0][0].score == pytest.approx(naming / (naming + unknown))


# ---- what is found --------------------------------------------------------------------------------------------------


def test_the_disease_and_the_kind_of_question_decide(toy: Index) -> None:
    first = [hits[0].row for hits in toy.search(["treatments for asthma", "bronchial asthma causes", "hepatitis B", "Reiter’s syndrome"])]
    assert first == [TOY[1], TOY[0], TOY[4], TOY[5]]


def test_barred_rows_are_not_found(archive: Index | TfidfIndex) -> None:
    questions = ["asthma", "asthma", "asthma"]
    free, one, two = archive.search(questions, k=6, without=[set(), {0}, [1, 0]])
    assert TOY[0] in [h.row for h in free]
    assert TOY[0] not in [h.row for h in one]
    assert found(two) == ["Gout"]


def test_equals_stand_in_the_order_of_the_rows() -> None:
    rows = [row("Asthma", "What causes Asthma ?", "Smoke.", document_id=str(n)) for n in range(30)]
    for archive in (Index(rows), TfidfIndex(rows)):
        assert [hit.row["document_id"] for hit in archive.search(["asthma"], k=25)[0]] == [str(n) for n in range(25)]


@pytest.mark.parametrize("question", ["", "   ", "\x00\x07", "哮喘", "Что вызывает астму?", "?!", "zzz"])
def test_a_question_without_a_known_word_finds_nothing(archive: Index | TfidfIndex, question: str) -> None:
    assert archive.search([question, "gout"])[0] == []


@pytest.mark.parametrize("question", ["what is the", "of the in a"])
def test_stop_words_alone_are_no_source(toy: Index, question: str) -> None:
    assert toy.close(toy.search([question])[0]) == []


@pytest.mark.parametrize("question", ["gout " * 20_000, "\x00gout\x1b[31m\n", "gout 痛风 ?", "<i>gout</i>"])
def test_a_strange_question_still_finds_its_disease(archive: Index | TfidfIndex, question: str) -> None:
    hit = archive.search([question])[0][0]
    assert (hit.row, 0 < hit.score <= 1) == (TOY[2], True)


def test_a_hundred_thousand_characters_of_other_words_are_no_source(toy: Index) -> None:
    question = " ".join(f"word{n}" for n in range(11_000)) + " gout"
    hits = toy.search([question])[0]
    assert found(hits)[:1] == ["Gout"]
    assert toy.close(hits) == []


def test_k_may_be_larger_than_the_archive(archive: Index | TfidfIndex) -> None:
    assert len(archive.search(["what causes asthma and the virus"], k=10**9)[0]) == len(TOY)


def test_one_row_is_an_archive() -> None:
    for archive in (Index(TOY[:1]), TfidfIndex(TOY[:1])):
        assert found(archive.search(["asthma"])[0]) == ["Asthma"]


def test_rows_with_nothing_but_question_and_answer() -> None:
    rows = [row(None, "What causes Gout ?", "Uric acid."), row(None, "Why do I sneeze ?", "Pollen or a cold.")]
    hits = [hits[0] for hits in Index(rows).search(["gout", "why do i sneeze"])]
    assert [(h.title, h.source, h.url, h.score) for h in hits] == [
        ("What causes Gout?", None, None, 1.0),
        ("Why do I sneeze?", None, None, 1.0),
    ]
    assert str(hits[0]) == "What causes Gout? (score 1.00; archived NIH text, collected about 2016-2019; links may have moved)"


def test_no_questions_find_nothing(archive: Index | TfidfIndex) -> None:
    assert archive.search([]) == []


@pytest.mark.parametrize("kind", [Index, TfidfIndex])
@pytest.mark.parametrize("rows", [[], [row(None, "?", "...")], [row(None, "哮喘", "哮喘")]])
def test_an_archive_without_words_is_refused(kind: type[Index] | type[TfidfIndex], rows: list[Row]) -> None:
    with pytest.raises(CourseError, match=rf"rows with text: got {len(rows)} rows.*data.prepare"):
        kind(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": "asthma"}, r"search\(\[question\]\)"),
        ({"questions": ["asthma"], "k": 0}, "k=0: expected 1 or more"),
        ({"questions": ["asthma"], "without": [{1}, {2}]}, "2 sets for 1 questions"),
        ({"questions": ["asthma"], "without": [{6}]}, "row 6: the index has rows 0 to 5"),
        ({"questions": ["asthma"], "without": [{-1}]}, "row -1"),
    ],
)
def test_a_search_that_cannot_be_meant_is_refused(archive: Index | TfidfIndex, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CourseError, match=message):
        archive.search(**arguments)


def test_a_hit_says_where_it_comes_from_in_one_line() -> None:
    archived = Hit(row("Asthma\n attack", "?", "", source="NHLBI", url="https://example.org/asthma"), 0.876)
    assert str(archived) == f"Asthma attack (NHLBI; https://example.org/asthma; score 0.88; {retrieval.ARCHIVED})"
    own = Hit(sample.rows()[0], 1.0)
    assert own.note == retrieval.COURSE_TEXT
    assert "archived" not in str(own)


# ---- the threshold --------------------------------------------------------------------------------------------------


class Fixed(Index):
    """An index whose best score for a question is the number that the question says."""

    def search(self, questions: Any, k: int = 3, without: Any = None) -> list[list[Hit]]:
        return [[Hit(TOY[0], float(q)), Hit(TOY[1], float(q) / 2)] for q in questions]


def test_the_threshold_lets_one_outsider_in_twenty_pass_and_no_more() -> None:
    index = Fixed(TOY)
    outside = [str(n / 100) for n in range(1, 41)]  # 0.01 ... 0.40: two of forty may pass, 0.40 and 0.39; 0.38 may not
    inside = ["0.2", "0.38", "0.385", "0.9"]
    assert calibrate(index, inside, outside) == index.threshold == pytest.approx((0.38 + 0.385) / 2)
    assert error_rates(index, inside, outside) == {"missed": 0.5, "false": 0.05}


@given(st.lists(st.integers(0, 10), min_size=1, max_size=60), st.lists(st.integers(0, 10), min_size=1, max_size=60))
def test_no_threshold_lets_more_outsiders_pass(inside: list[int], outside: list[int]) -> None:
    index = Fixed(TOY)
    calibrate(index, [str(n / 10) for n in inside], [str(n / 10) for n in outside])
    rates = error_rates(index, [str(n / 10) for n in inside], [str(n / 10) for n in outside])
    assert rates["false"] <= 0.05
    missed_by_less = [n for n in inside if n / 10 < index.threshold]  # a lower threshold would have to let too many pass
    assert not missed_by_less or sum(o >= max(missed_by_less) for o in outside) > 0.05 * len(outside)


@pytest.mark.parametrize(("inside", "outside"), [([], ["1"]), (["1"], []), ([], [])])
def test_a_threshold_needs_questions(inside: list[str], outside: list[str]) -> None:
    for function in (calibrate, error_rates):
        with pytest.raises(CourseError, match=r"got none.*probes\(rows\)"):
            function(Fixed(TOY), inside, outside)


def test_only_hits_at_or_over_the_threshold_are_close(toy: Index) -> None:
    hits = [Hit(TOY[0], toy.threshold), Hit(TOY[1], toy.threshold - 1e-9)]
    assert toy.close(hits) == hits[:1]
    assert toy.close([]) == []


def test_probes_ask_by_every_name_and_never_in_a_template() -> None:
    asked = probes(TOY * 4)
    assert len(asked) == len(TOY) * 4 and asked == probes(TOY * 4) and len(probes(TOY, most=2)) == 2
    assert not any(data.template_of(question) for question in asked)
    assert any("Bronchial asthma" in q for q in asked) and any("Asthma" in q for q in asked)


def test_an_index_knows_a_disease_by_any_of_its_names(toy: Index) -> None:
    assert toy.knows(row("ASTHMA, bronchial", "?", ""))
    assert toy.knows(row("Something", "?", "", synonyms=["Reiters syndrome"]))
    assert not toy.knows(row("Arthritis", "?", ""))


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(toy: Index, tmp_path: Path) -> Path:
    toy.save(tmp_path / "index")
    return tmp_path / "index"


def test_a_saved_index_answers_as_before(tmp_path: Path) -> None:
    index = Index(sample.rows(), threshold=0.3)
    index.save(str(tmp_path / "runs" / "index"))
    again = Index.load(str(tmp_path / "runs" / "index"))
    questions = [*probes(sample.rows(), 40), "what is the", ""]
    assert again.search(questions, k=7) == index.search(questions, k=7)
    assert (again.threshold, again.rows) == (0.3, index.rows)


def test_saving_again_replaces_the_index_and_nothing_else(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    Index(TOY[:2]).save(saved)
    assert Index.load(saved).rows == TOY[:2]
    assert (saved / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in saved.iterdir()) == ["headings", "index.json", "notes.txt", "rows.parquet", "wholes"]


def test_a_save_that_fails_leaves_the_older_index(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("bm25s.BM25.save", full)
        with pytest.raises(CourseError, match=r"cannot write the index.*No space left.*another folder"):
            Index(TOY[:2]).save(saved)
    assert Index.load(saved).rows == TOY


def test_a_save_that_is_cut_off_while_files_move_is_no_index(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Path.replace

    def cut(self: Path, target: Any) -> Path:
        if self.name == "vocab.index.json":
            raise KeyboardInterrupt
        return moved(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            Index(TOY[:2]).save(saved)
    with pytest.raises(CourseError, match="no whole index"):
        Index.load(saved)


def test_an_index_cannot_be_saved_into_a_file(toy: Index, tmp_path: Path) -> None:
    (tmp_path / "index").write_text("")
    with pytest.raises(CourseError, match="cannot write the index"):
        toy.save(tmp_path / "index")


def rewrite(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**card, **changes}))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no card": lambda f: (f / "index.json").unlink(),
    "card is no JSON": lambda f: (f / "index.json").write_text("{"),
    "card is no text": lambda f: (f / "index.json").write_bytes(b"\xff\xfe\x00"),
    "card is a list": lambda f: (f / "index.json").write_text("[]"),
    "card of something else": lambda f: (f / "index.json").write_text('{"name": "x"}'),
    "another version": lambda f: rewrite(f, version=2),
    "threshold is no number": lambda f: rewrite(f, threshold="high"),
    "card without hashes, no rankings": lambda f: (rewrite(f, sha256={}), (f / "wholes" / "params.index.json").unlink()),
    "hashes are no table": lambda f: rewrite(f, sha256=3),
    "no rows": lambda f: (f / "rows.parquet").unlink(),
    "no vocabulary": lambda f: (f / "headings" / "vocab.index.json").unlink(),
    "cut off": lambda f: (f / "wholes" / "data.csc.index.npy").write_bytes((f / "wholes" / "data.csc.index.npy").read_bytes()[:-4]),
    "one ranking in the place of the other": lambda f: (f / "headings" / "vocab.index.json").replace(f / "wholes" / "vocab.index.json"),
    "rows of another archive": lambda f: data.write_rows(f / "rows.parquet", TOY[:3]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_refused_with_a_next_step(saved: Path, damage: str) -> None:
    DAMAGES[damage](saved)
    with pytest.raises(CourseError, match=r"no whole index in .*Index\(rows\)\.save\(folder\)"):
        Index.load(saved)


def test_a_folder_that_is_not_there_or_is_another_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CourseError, match="no whole index"):
            Index.load(folder)


def test_nothing_is_unpickled(saved: Path, tmp_path: Path) -> None:
    class Mark:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    file = saved / "wholes" / "data.csc.index.npy"
    numpy.save(file, numpy.array([Mark()], dtype=object), allow_pickle=True)
    hashes = json.loads((saved / "index.json").read_text())["sha256"]
    rewrite(saved, sha256={**hashes, "wholes/data.csc.index.npy": hashlib.sha256(file.read_bytes()).hexdigest()})
    with pytest.raises(CourseError, match="no whole index"):
        Index.load(saved)
    assert not (tmp_path / "ran").exists()


def run(code: str, **environment: str) -> str:
    known = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], env={**known, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_same_files_in_every_process(tmp_path: Path) -> None:
    code = (
        "from medquad_utils.assets.sample import rows; from medquad_utils.retrieval import Index, probes; import sys\n"
        "index = Index(rows()[:90]); index.save(sys.argv[-1] if sys.argv[1:] else {folder!r})\n"
        "print([(h.score, h.row['document_id']) for hits in index.search(probes(rows()[:90], 30)) for h in hits])"
    )
    told = [run(code.format(folder=str(tmp_path / seed)), PYTHONHASHSEED=seed) for seed in ("1", "2")]
    assert told[0] == told[1] != "[]"
    assert (tmp_path / "1" / "index.json").read_text() == (tmp_path / "2" / "index.json").read_text()


def test_importing_is_light_and_jax_does_not_get_the_gpu(tmp_path: Path) -> None:
    """bm25s calls jax at import where it finds it; jax then takes three quarters of a GPU unless it is told to stay on the CPU."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("")
    (tmp_path / "jax" / "lax.py").write_text("import os\ndef top_k(values, k): print('jax on', os.environ.get('JAX_PLATFORMS'))\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = "import sys; from medquad_utils import retrieval; print({'bm25s', 'sklearn', 'torch'} & set(sys.modules)); retrieval._bm25s()"
    assert run(code, PYTHONPATH=path).split("\n") == ["set()", "jax on cpu"]


# ---- the real data --------------------------------------------------------------------------------------------------


class Real(NamedTuple):
    """An index of training rows; rows that were taken out of it, their diseases left in; rows of other diseases."""

    index: Index
    inside: list[Row]
    outside: list[Row]
    test: list[Row]


@pytest.fixture(scope="module")
def real(medquad_xml: Path) -> Real:
    parts = data.split(data.load_xml(medquad_xml).rows)
    rows_of = Counter(map(focus_of, parts.train))
    inside = data.draw(parts.train, 200, 0, lambda r: rows_of[focus_of(r)] > 2)
    out = {id(r) for r in inside}
    index = Index([r for r in parts.train if id(r) not in out])
    return Real(index, inside, *([r for r in part if not index.knows(r)] for part in (parts.validation, parts.test)))


def test_the_threshold_is_the_one_of_the_real_data(real: Real) -> None:
    assert calibrate(real.index, probes(real.inside), probes(real.outside)) == pytest.approx(retrieval.THRESHOLD, abs=0.06)
    rates = error_rates(real.index, probes(real.inside), probes(real.test))  # of diseases that had no part in the choice
    assert 0 < rates["missed"] < 0.3 and 0 < rates["false"] < 0.1


def test_the_fused_search_finds_more_diseases_than_tfidf(real: Real) -> None:
    simple = TfidfIndex(real.index.rows)

    def share(archive: Index | TfidfIndex, questions: list[str], rows: list[Row]) -> tuple[float, float]:
        right = [[focus_of(h.row) == focus_of(r) for h in hits] for hits, r in zip(archive.search(questions), rows, strict=True)]
        return sum(r[0] for r in right) / len(right), sum(any(r) for r in right) / len(right)

    drawn = data.draw(real.inside, 0, 0)  # the order in which probes asks
    for questions, rows in ((probes(real.inside), drawn), ([r["question"] for r in real.inside], real.inside)):
        ours, theirs = share(real.index, questions, rows), share(simple, questions, rows)
        assert ours[0] > theirs[0] - 0.02 and ours[1] > theirs[1] - 0.02
        assert ours[0] > 0.85 and ours[1] > 0.9


def test_the_columns_of_the_hub_can_be_searched(medquad_csv: Path) -> None:
    rows = data.load_table(medquad_csv).rows[:3000]
    index = Index(rows)
    asked = rows[:: len(rows) // 104][:104]
    hits = index.search([r["question"] for r in asked])
    assert [len(h) for h in hits] == [3] * 104
    assert sum(r["question"] in [hit.row["question"] for hit in h] for h, r in zip(hits, asked, strict=True)) >= 98
    assert all(0 <= hit.score <= 1 and retrieval.ARCHIVED in str(hit) for h in hits for hit in h)
