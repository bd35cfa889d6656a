"""The arms that need no training, answers that survive a kill, and metrics worked out again from the table of answers."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet
import pytest
from conftest import NASTY, small_evaluation

from medquad_utils import arms, chat, evaluation, generation, profiles, retrieval, scores
from medquad_utils.assets import sample
from medquad_utils.cleaning import is_boilerplate
from medquad_utils.data import COLUMNS, Row
from medquad_utils.generation import Answer
from medquad_utils.profiles import CourseError, Hardware, Plan
from medquad_utils.questions import Question

REPO = Path(__file__).parent.parent
MODELS = ("base", "tuned", "grounded")
LOOK_UPS = ("nearest", "another disease")
IDS = [str(n) for n in range(1, 11)]


def row(qtype: str, question: str, answer: str, **others: Any) -> Row:
    return {**dict.fromkeys(COLUMNS), "qtype": qtype, "question": question, "answer": answer, **others}


@pytest.fixture
def several() -> Row:
    """A row of the sample whose answer lists three facts or more."""
    return next(r for r in sample.rows() if len(sample.facts_of(str(r["focus"]), str(r["qtype"]))) >= 3 and r["qtype"] == "symptoms")


# ---- baselines and the outcome --------------------------------------------------------------------------------------

TRAIN = [
    row("symptoms", "What are the symptoms of Shingles ?", "S-shingles"),
    row("symptoms", "What are the symptoms of Gout in the foot ?", "S-gout"),
    row("treatment", "What are the treatments for Shingles ?", "T-shingles"),
    row("treatment", "What are the treatments for Gout ?", "T-gout"),
]


def test_the_nearest_training_answer_is_of_the_same_question_type() -> None:
    asked = [
        row("treatment", "What are the treatments for Gout in old age ?", ""),
        row("symptoms", "What are the symptoms of Shingles in old age ?", ""),
        row("symptoms", "What are the treatments for Shingles ?", ""),  # the words are those of a treatment row, the type is not
    ]
    assert evaluation.nearest_training_answers(TRAIN, asked) == ["T-gout", "S-shingles", "S-shingles"]


def test_a_question_type_that_training_lacks_is_looked_up_among_all() -> None:
    assert evaluation.nearest_training_answers(TRAIN, [row("outlook", "Gout in the foot: what comes next ?", "")]) == ["S-gout"]


def test_the_nearest_training_answer_of_a_training_question_is_its_own() -> None:
    rows = sample.rows()[:200]
    assert evaluation.nearest_training_answers(rows, rows[::7]) == [r["answer"] for r in rows[::7]]


def test_the_outcome_holds_what_was_measured(several: Row) -> None:
    other = row("symptoms", "What are the symptoms of X ?", "alpha beta gamma delta", source="elsewhere")
    base = [Answer("", 64, False), Answer("alpha beta", 2, False)]
    tuned = [Answer(several["answer"], 20, True), Answer("alpha beta gamma", 3, False)]
    train = [row("symptoms", "What are the symptoms of X ?", "alpha")]
    found = evaluation.outcome([several, other], train, base, tuned)
    assert {k: v for k, v in found.items() if k != "rouge_l_gain_ci95"} == {
        "rows": 2,
        "rouge_l_base": round((0 + 2 * 2 / 6) / 2, 4),
        "rouge_l_tuned": round((1 + 2 * 3 / 7) / 2, 4),
        "rouge_l_nearest": round((0 + 2 * 1 / 5) / 2, 4),
        "stop_rate_base": 0.0,
        "stop_rate_tuned": 0.5,
        "facts_complete_base": 0.0,
        "facts_complete_tuned": 1.0,
        "facts_complete_nearest": 0.0,
    }
    low, high = found["rouge_l_gain_ci95"]
    assert (low, high) == pytest.approx((6 / 7 - 4 / 6, 1.0), abs=1e-4)  # of two values, the extremes: one row drawn twice


def test_the_outcome_of_rows_without_facts_says_none_instead_of_zero() -> None:
    rows = [row("symptoms", "What are the symptoms of X ?", "alpha beta")]
    found = evaluation.outcome(rows, rows, [Answer("alpha", 1, True)], [Answer("alpha beta", 2, True)])
    assert [found[f"facts_complete_{who}"] for who in ("base", "tuned", "nearest")] == [None, None, None]
    assert found["rouge_l_gain_ci95"] == pytest.approx([1 / 3, 1 / 3], abs=1e-4)


# ---- look-ups -------------------------------------------------------------------------------------------------------


def test_of_equally_alike_questions_the_first_is_taken() -> None:
    train = [row("symptoms", "What are the symptoms of Gout ?", answer) for answer in ("first", "second")]
    assert evaluation.nearest_training_answers(train, [row("symptoms", "Gout ?", "")]) == ["first"]


def test_the_nearest_question_is_that_of_a_plain_search_over_all_pairs() -> None:
    """The oracle works out each cosine on its own, with the vectoriser's numbers but without its products."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = sample.rows()[::3]
    train, asked = rows[40:240], rows[:40]
    table = TfidfVectorizer().fit([r["question"] for r in train])
    known, wanted = (table.transform([r["question"] for r in part]).toarray() for part in (train, asked))
    expected = []
    for vector, r in zip(wanted, asked, strict=True):
        cosines = {n: round(float(numpy.dot(vector, known[n])), 9) for n, t in enumerate(train) if t["qtype"] == r["qtype"]}
        expected.append(train[max(cosines, key=lambda n: (cosines[n], -n))]["answer"])
    assert evaluation.nearest_training_answers(train, asked) == expected


def test_an_answer_about_another_disease_is_of_the_same_source_and_type_if_there_is_one() -> None:
    train = [
        row("symptoms", "Q", "same disease", focus="Gout", source="A"),
        row("symptoms", "Q", "right", focus="Shingles", source="A"),
        row("symptoms", "Q", "other source", focus="Asthma", source="B"),
        row("treatment", "Q", "other type", focus="Asthma", source="A"),
    ]
    asked = [
        row("symptoms", "Q", "", focus="GOUT!", source="A"),
        row("symptoms", "Q", "", focus="Shingles", source="C"),
        row("treatment", "Q", "", focus="Gout", source=None),
        row("outlook", "Q", "", focus="Asthma", source=None),
    ]
    for seed in range(8):
        found = evaluation.other_disease_answers(train, asked, seed)
        assert found[0] == "right"
        assert found[1] in ("same disease", "other source"), "the source is unknown: of the same type"
        assert found[2] == "other type"
        assert found[3] in ("same disease", "right"), "the type is unknown: any other disease"
        assert evaluation.other_disease_answers(train, asked, seed) == found
    assert len({tuple(evaluation.other_disease_answers(train, asked, seed)) for seed in range(8)}) > 1
    assert evaluation.other_disease_answers(train[:1], asked[:1]) == [""], "training knows no other disease"


@pytest.mark.parametrize(("prose", "nearest", "another"), [(False, 0.32, 0.29), (True, 0.23, 0.19)], ids=["raw", "without boilerplate"])
def test_on_the_real_medquad_look_ups_reach_what_the_data_sheet_says(
    real_rows: list[Row], prose: bool, nearest: float, another: float
) -> None:
    """A random split by row, as the upstream run made one: nine rows in ten are training."""
    rows = [r for r in real_rows if not is_boilerplate(r)] if prose else real_rows
    order = numpy.random.default_rng(0).permutation(len(rows))
    cut = len(rows) // 10
    found = evaluation.look_up_scores([rows[n] for n in order[cut:]], [rows[n] for n in order[:cut]])
    assert found["nearest"]["n"] == cut
    assert found["nearest"]["mean"] == pytest.approx(nearest, abs=0.02)
    assert found["another disease"]["mean"] == pytest.approx(another, abs=0.02)
    assert all(cell["low"] < cell["mean"] < cell["high"] < cell["low"] + 0.04 for cell in found.values())


# ---- the journal ----------------------------------------------------------------------------------------------------

RECIPE = {"model": "m", "seed": 0}
ONE, TWO = Answer("one\n\u2028é", 3, True), Answer("", 0, False)


def test_a_journal_remembers_each_batch(tmp_path: Path) -> None:
    journal = arms.Journal(path := tmp_path / "j.jsonl", RECIPE)
    journal.add("base", {"1": ONE, "2": TWO})
    journal.add("tuned", {"1": TWO})
    assert arms.Journal(path, RECIPE).done == {"base": {"1": ONE, "2": TWO}, "tuned": {"1": TWO}}
    assert len(path.read_text().splitlines()) == 3


def test_wherever_a_kill_tears_the_last_line_the_lines_before_it_stay_and_new_ones_follow(tmp_path: Path) -> None:
    journal = arms.Journal(path := tmp_path / "j.jsonl", RECIPE)
    journal.add("base", {"1": ONE})
    whole = path.read_bytes()
    journal.add("base", {"2": TWO})
    last = path.read_bytes()[len(whole) :]
    for cut in range(0, len(last) - 1, 7):
        path.write_bytes(whole + last[:cut])
        again = arms.Journal(path, RECIPE)
        assert again.done == {"base": {"1": ONE}}
        again.add("base", {"3": TWO})
        assert arms.Journal(path, RECIPE).done == {"base": {"1": ONE, "3": TWO}}


def test_a_torn_first_line_is_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_text('{"model": "m", "se')
    assert arms.Journal(tmp_path / "j.jsonl", RECIPE).done == {}


def test_a_journal_of_another_recipe_is_set_aside_and_named(tmp_path: Path) -> None:
    path, said = tmp_path / "j.jsonl", []
    arms.Journal(path, RECIPE).add("base", {"1": ONE})
    before = path.read_bytes()
    assert arms.Journal(path, RECIPE | {"seed": 1}, said.append).done == {}
    assert said == ["j.jsonl is of another run (seed differ): set aside as j.jsonl.old."]
    assert (tmp_path / "j.jsonl.old").read_bytes() == before


def test_a_full_disk_is_one_clear_message(tmp_path: Path) -> None:
    journal = arms.Journal(tmp_path / "j.jsonl", RECIPE)
    journal.path = Path("/dev/full")
    with pytest.raises(CourseError, match=r"cannot write full: No space left.*run again: it goes on from here"):
        journal.add("base", {"1": ONE})


# ---- a whole evaluation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metrics(evaluated: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((evaluated / "metrics.json").read_text())
    return found


@pytest.fixture(scope="module")
def answers(evaluated: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pyarrow.parquet.read_table(evaluated / "answers.parquet").to_pylist()
    return found


def test_every_arm_answers_every_question_within_the_limit(answers: list[dict[str, Any]]) -> None:
    ours = [a for a in answers if a["arm"] in arms.ARMS]
    assert Counter((a["arm"], a["id"]) for a in ours) == Counter((arm, key) for arm in arms.ARMS for key in IDS)
    assert max(a["tokens"] for a in ours) == 8
    assert all(a["stopped"] for a in ours if a["tokens"] < 8)
    assert {a["arm"] for a in answers} - set(arms.ARMS) == {"base, safety", "tuned, safety"}


def test_the_answers_are_those_of_the_base_and_of_the_tuned_model(tiny_adapter: Path, answers: list[dict[str, Any]]) -> None:
    """The oracle loads the base without any adapter, and asks one question at a time."""
    plan = profiles.resolve("tiny", hardware=Hardware("cpu", "any", 16.0, cores=2))
    tokenizer = generation.load_tokenizer(plan)
    for arm, model in {"base": generation.load_base(plan), "tuned": generation.load_tuned(plan, tiny_adapter)}.items():
        given = [a for a in answers if a["arm"] == arm][::4]
        assert [generation.ask(model, tokenizer, [a["question"]], 8)[0].text for a in given] == [a["answer"] for a in given]


def test_look_up_answers_are_cut_where_a_models_would_be(answers: list[dict[str, Any]]) -> None:
    tokenizer = generation.load_tokenizer(profiles.resolve("tiny", hardware=Hardware("cpu", "any", 16.0, cores=2)))
    known = {str(r["answer"]) for r in sample.rows()}
    given = [a for a in answers if a["arm"] in LOOK_UPS]
    assert {a["stopped"] for a in given} == {False}
    for a in given:
        assert a["answer"] not in known
        assert any(text.startswith(a["answer"]) for text in known)
        assert len(tokenizer(a["answer"], add_special_tokens=False)["input_ids"]) <= 8
    short = arms.cut_answer(tokenizer, "  Rest. ", 8)
    assert (short.text, short.stopped) == ("  Rest. ", True)


def of_one_disease() -> list[Row]:
    rows = sample.rows()
    return [r for r in rows if r["focus"] == rows[0]["focus"]]


def test_a_passage_that_is_the_reference_is_withheld_and_others_are_read(tiny_adapter: Path) -> None:
    plan = profiles.resolve("tiny", hardware=Hardware("cpu", "any", 16.0, cores=2))
    tokenizer, model = generation.load_tokenizer(plan), generation.load_base(plan)
    archive = of_one_disease()
    asked = [Question.of(1, {**archive[0], "answer": archive[0]["answer"].upper()}), Question(2, "What is a zzyzx quux ?", ("x",))]
    notes: dict[str, list[int]] = {}
    jobs = arms.prompts(plan, model, tokenizer, asked, retrieval.Index(archive), notes)
    assert set(jobs["grounded"]) == {"1"}
    assert notes == {arms.UNGROUNDED: [2]}
    assert retrieval.NO_SOURCE in arms.UNGROUNDED
    said = jobs["grounded"]["1"][1]["content"]
    assert archive[0]["answer"] not in said
    assert sum(r["answer"] in said for r in archive[1:]) == arms.PASSAGES
    assert said.endswith(chat.tidy_question(archive[0]["question"]))


def test_what_counts_as_a_close_source_is_fixed_on_validation_diseases_that_training_lacks() -> None:
    rows = sample.rows()
    names = sorted({str(r["focus"]) for r in rows})
    train = [r for r in rows if r["focus"] in names[:100]]
    validation, others = ([r for r in rows if r["focus"] in part] for part in (names[100:120], names[120:]))
    index = arms.archive_index(train, others, validation)
    assert index.rows == [*train, *others]
    small = retrieval.Index(train)
    inside, outside = retrieval.probes(train), retrieval.probes(validation)
    assert index.threshold == retrieval.calibrate(small, inside, outside)
    assert retrieval.error_rates(small, inside, outside)["false"] <= retrieval.FALSE_SOURCES
    assert arms.archive_index(train, [], []).threshold == retrieval.THRESHOLD
    assert arms.archive_index(train, [], train[:9]).threshold == retrieval.THRESHOLD, "no disease that training lacks"


def test_a_question_over_the_context_is_cut_and_its_row_named_in_every_arm(tiny_adapter: Path) -> None:
    plan = profiles.resolve("tiny", hardware=Hardware("cpu", "any", 16.0, cores=2))
    tokenizer, model = generation.load_tokenizer(plan), generation.load_base(plan)
    archive = of_one_disease()
    name = archive[0]["focus"]
    notes: dict[str, list[int]] = {}
    jobs = arms.prompts(plan, model, tokenizer, [Question(7, f"What is {name}? " * 900, ("x",))], retrieval.Index(archive), notes)
    assert notes[arms.CUT] == [7]
    for arm in MODELS:
        for messages in jobs[arm].values():
            assert len(chat.prompt_ids(tokenizer, messages)) + plan.max_new_tokens <= model.config.max_position_embeddings
    answer = generation.generate(model, tokenizer, list(jobs["tuned"].values()), 4)[0]
    assert answer.tokens <= 4


def test_the_metrics_are_those_of_the_table_of_answers(metrics: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Every mean, and every paired difference, worked out again from the columns of ``answers.parquet``."""
    columns = {arm: [a for a in answers if a["arm"] == arm] for arm in arms.ARMS}
    overall = metrics["overall"]
    for score in ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "tfidf_cosine", "facts_complete", "length_ratio", "repetition"):
        for arm, given in columns.items():
            values = [a[score] for a in given]
            known = [v for v in values if v is not None]
            cell = overall["arms"][arm][score]
            assert (cell["n"], cell["mean"]) == (len(known), pytest.approx(numpy.mean(known), abs=1e-4))
            assert cell["low"] <= cell["mean"] <= cell["high"]
            if arm != "base":
                gains = [v - b[score] for v, b in zip(values, columns["base"], strict=True) if v is not None]
                assert overall["versus base"][arm][score]["mean"] == pytest.approx(numpy.mean(gains), abs=1e-4)
    texts = {arm: [a["answer"] for a in given] for arm, given in columns.items()}
    references = [a["references"] for a in columns["base"]]
    assert overall["arms"]["tuned"]["rougeL"]["mean"] == pytest.approx(scores.rouge_l(texts["tuned"], references).mean(), abs=1e-4)
    stops = numpy.mean([a["stopped"] for a in columns["tuned"]])
    assert overall["arms"]["tuned"]["stop_rate"]["mean"] == pytest.approx(stops, abs=1e-4)
    assert overall["arms"]["tuned"]["facts_complete"]["n"] == 8, "two questions are of a source that lists no facts"


def test_likelihood_is_of_models_only_and_all_rows_together(metrics: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    overall = metrics["overall"]["arms"]
    for arm in MODELS:
        given = [a for a in answers if a["arm"] == arm]
        bits = sum(a["nats"] for a in given) / sum(a["bytes"] for a in given) / math.log(2)
        assert overall[arm]["bits_per_byte"]["mean"] == pytest.approx(bits, abs=1e-4)
        assert overall[arm]["perplexity"]["n"] == 10
    assert all("bits_per_byte" not in overall[arm] for arm in LOOK_UPS)
    nats = {arm: [a["nats"] for a in answers if a["arm"] == arm] for arm in MODELS}
    asked = [a["id"] for a in answers if a["arm"] == "base"]
    alone = [n for n, key in enumerate(asked) if int(key) in _ungrounded(metrics)]
    assert 0 < len(alone) < 10
    for n in range(10):
        assert nats["base"][n] != nats["tuned"][n]
        assert (nats["grounded"][n] == nats["tuned"][n]) == (n in alone), "without passages the prompt is the tuned arm's"


def _ungrounded(metrics: dict[str, Any]) -> list[int]:
    found: list[int] = next(note["rows"] for note in metrics["notes"] if note["what"] == arms.UNGROUNDED)
    return found


def test_groups_hold_all_questions_once_and_small_ones_have_no_interval(metrics: dict[str, Any]) -> None:
    for name, groups in {"by_qtype": {"symptoms", "treatment", "not given"}, "by_source": {"course sample", "GHR", "<i>x</i>"},
                         "by_kind": {"prose", "boilerplate"}}.items():  # fmt: skip
        assert set(metrics[name]) == groups
        assert sum(group["n"] for group in metrics[name].values()) == 10
        for group in metrics[name].values():
            cell = group["arms"]["tuned"]["rougeL"]
            assert cell["n"] == group["n"]
            assert (cell["low"] is None) == (cell["high"] is None) == (group["n"] < evaluation.FEW)
            assert set(group["versus nearest"]) == set(arms.ARMS) - {"nearest"}


def test_a_thousand_groups_are_counted_together_but_for_the_largest() -> None:
    columns = {arm: {"rougeL": numpy.linspace(0, 1, 300)} for arm in arms.ARMS}
    groups = evaluation.by_group(columns, [*(f"rare {n}" for n in range(200)), *["big\nname " * 20] * 60, *[None] * 40])
    assert len(groups) == evaluation.MOST_GROUPS + 1
    assert sum(group["n"] for group in groups.values()) == 300
    assert {name: group["n"] for name, group in list(groups.items())[1:3]} == {("big name " * 20)[:60]: 60, "not given": 40}
    assert groups["all others"]["n"] == 178


def test_the_other_parts_are_there(metrics: dict[str, Any]) -> None:
    assert "Hub is out of reach" in metrics["bert_score"]
    assert metrics["forgetting"]["texts"] == 5
    assert metrics["forgetting"]["ratio"]["mean"] > 1, "random adapters harm what the base knows"
    assert {part: metrics["safety"][part]["overall"]["n"] for part in ("base", "tuned")} == {"base": 6, "tuned": 6}
    assert metrics["safety"]["outer_rule"]["n"] == 2
    assert metrics["notes"][0] == {"what": "skipped: <u>a test</u>", "n": 2, "rows": [11, 12]}
    assert metrics["leakage"]["focus"] == metrics["leakage"]["normalised question"] == 0
    assert metrics["held_out"] is True
    assert [e["what"] for e in metrics["examples"]] == ["best", "middling", "worst"]
    assert metrics["recipe"]["max_new_tokens"] == 8


def _sides(low: float, high: float, score: str = "rougeL") -> dict[str, Any]:
    cells = {"base": (0.1, 0.2), "nearest": (low, high), "another disease": (0.2, 0.3)}
    overall = {f"versus {arm}": {"tuned": {score: {"mean": 0, "low": a, "high": b, "n": 9}}} for arm, (a, b) in cells.items()}
    (found,) = evaluation.verdict(overall)
    return found


def test_an_arm_is_beaten_only_if_the_whole_interval_lies_on_the_better_side() -> None:
    every = list(evaluation.WITHOUT_TRAINING)
    assert _sides(0.01, 0.2) == {"score": "rougeL", "beats": every, "even": [], "loses": []}
    assert _sides(0.0, 0.2)["even"] == ["nearest"]
    assert _sides(-0.1, 0.2)["even"] == ["nearest"]
    assert _sides(-0.2, -0.01)["loses"] == ["nearest"]
    assert _sides(-0.2, -0.1, "bits_per_byte") == {
        "score": "bits_per_byte",
        "beats": ["nearest"],
        "even": [],
        "loses": ["base", "another disease"],
    }


def test_too_few_questions_have_no_verdict() -> None:
    cell = {"mean": 0.5, "low": None, "high": None, "n": 4}
    assert evaluation.verdict({f"versus {arm}": {"tuned": {"rougeL": cell}} for arm in evaluation.WITHOUT_TRAINING}) == []


# ---- killed and started again ---------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
conftest.small_evaluation(Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many conversations each call of the generator is asked for."""
    asked: list[int] = []
    real = arms.generate_batches

    def counted(model: Any, tokenizer: Any, conversations: Any, *rest: Any) -> Any:
        asked.append(len(conversations))
        return real(model, tokenizer, conversations, *rest)

    monkeypatch.setattr(arms, "generate_batches", counted)
    return asked


def test_a_run_that_was_killed_generates_only_the_rest_and_ends_with_the_same_numbers(
    tiny_adapter: Path, evaluated: Path, tmp_path: Path, generated: list[int]
) -> None:
    journal = tmp_path / "answers.partial.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(REPO / "tests"), str(tiny_adapter), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None and (not journal.is_file() or journal.read_bytes().count(b"\n") < 8):
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL, "it ended before it was killed"
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    saved = sum(len(line["answers"]) for line in lines)
    assert saved >= 14
    with journal.open("a") as file:
        file.write('{"arm": "tuned", "answers": {"1": ["a torn li')
    again = small_evaluation(tiny_adapter, tmp_path)
    grounded = 10 - len(_ungrounded(again))
    assert saved + sum(generated) == 10 + 10 + grounded + 6 + 6
    before = json.loads((evaluated / "metrics.json").read_text())
    assert again["overall"] == before["overall"], "killed or not"
    assert not journal.exists()


def test_a_second_run_of_the_same_recipe_generates_nothing(tiny_adapter: Path, evaluated: Path, generated: list[int]) -> None:
    before = (evaluated / "metrics.json").read_bytes(), (evaluated / "answers.parquet").read_bytes()
    small_evaluation(tiny_adapter, evaluated)
    assert generated == []
    assert ((evaluated / "metrics.json").read_bytes(), (evaluated / "answers.parquet").read_bytes()) == before
    assert not list(evaluated.glob("*partial*"))


# ---- which adapter, which rows --------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return profiles.resolve("tiny", hardware=Hardware("cpu", "any", 16.0, cores=2), out=str(tmp_path))


def test_the_plan_is_the_adapters_own_unless_another_is_asked_for(tiny_adapter: Path) -> None:
    plan, folder = evaluation.plan_of("", str(tiny_adapter))
    assert (plan.profile, folder) == ("tiny", tiny_adapter)
    plan, folder = evaluation.plan_of("tiny")
    assert folder == plan.folder / "adapter"


def test_rows_of_another_source_than_the_adapters_are_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"source": "xml"}))
    with pytest.raises(CourseError, match=r"trained on 'xml' rows, not on 'sample'.*--data"):
        evaluation.training_rows(plan, tmp_path)
    with pytest.raises(CourseError, match=r"no train.parquet in nowhere/: expected the folder that medquad data wrote"):
        evaluation.training_rows(plan, tmp_path, tmp_path / "nowhere")


def test_the_training_rows_are_those_of_the_plan(plan: Plan, tiny_adapter: Path) -> None:
    rows = evaluation.training_rows(plan, tiny_adapter)
    assert rows == evaluation.training_rows(plan, tiny_adapter, plan.folder / "data")
    assert len(rows) > 500
    (tiny_adapter.parent / "bare").mkdir(exist_ok=True)
    assert evaluation.training_rows(plan, tiny_adapter.parent / "bare") == rows, "an adapter without a record"


def test_a_question_of_html_and_special_tokens_was_asked_and_kept_as_text(answers: list[dict[str, Any]]) -> None:
    assert [a["question"] for a in answers if a["id"] == "9" and a["arm"] in arms.ARMS] == [NASTY] * 5
