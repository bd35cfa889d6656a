"""Attributions against leave-one-out by hand, and the page."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import build_sample
import numpy
import pytest
import torch
from captum.attr import FeatureAblation, LLMAttribution, TextTemplateInput
from conftest import NASTY, Markup, tiny

from medquad_utils import CourseError, cli, evaluation, explanation, generation, retrieval, safety
from medquad_utils.chat import NOTICE, grounded_messages, prompt_ids, prompt_messages
from medquad_utils.explanation import Prompt
from medquad_utils.generation import Answer

QUESTION, NAME = "What are the treatments for Celiac disease ?", "celiac disease"
ANSWER = "Treatment for celiac disease can include a gluten-free diet."
PASSAGES = ("Celiac disease: Eat no gluten.", "Gout: Rest the joint.")


@pytest.fixture(scope="module")
def lm(tiny_adapter: Path, tiny_tokenizer: Any) -> tuple[Any, Any]:
    """(model, tokenizer): the 4-bit base with random adapters. The tests hold for any weights."""
    return generation.load_tuned(tiny(), tiny_adapter), tiny_tokenizer


@pytest.fixture(scope="module")
def log_p(lm: Any) -> Any:
    """log p(answer | messages) by hand: one forward pass and no code of the package's scores."""
    model, tokenizer = lm

    def by_hand(question: str | list[dict[str, str]], answer: str = ANSWER) -> float:
        turns = prompt_messages(question) if isinstance(question, str) else question
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        asked, said = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, answer))
        with torch.no_grad():
            found = model(torch.tensor([asked + said])).logits[0].double().log_softmax(-1)
        return sum(float(found[len(asked) + n - 1, token]) for n, token in enumerate(said))

    return by_hand


def test_leave_one_out_equals_captum_and_deletions_by_hand(lm: Any, log_p: Any) -> None:
    (model, tokenizer), prompt = lm, Prompt("What causes gout ?")
    left = ["causes gout?", "What gout?", "What causes?", "What causes gout"]
    expected = [log_p("What causes gout?") - log_p(text) for text in left]
    assert numpy.abs(expected).max() > 0.05, "the comparison would hold for zeros too"
    assert explanation.leave_one_out(*lm, prompt, ANSWER) == pytest.approx(expected, abs=1e-3)

    def render(*units: str) -> torch.Tensor:  # captum empties what it leaves out
        kept = {n for n, unit in enumerate(units) if unit}
        return torch.tensor([prompt_ids(tokenizer, prompt.messages(kept))])

    found = LLMAttribution(FeatureAblation(model), tokenizer).attribute(
        TextTemplateInput(render, prompt.units),
        target=torch.tensor(tokenizer(ANSWER, add_special_tokens=False)["input_ids"]),
        forward_in_tokens=False,  # with transformers 5, its default gives wrong numbers
    )
    assert found.seq_attr.numpy() == pytest.approx(expected, abs=1e-3)


def test_a_left_out_passage_renumbers_the_others(lm: Any, log_p: Any) -> None:
    prompt, asked = Prompt(QUESTION, PASSAGES, NAME), "What are the treatments for Celiac disease?"
    left = [grounded_messages(asked, [text]) for text in reversed(PASSAGES)]
    left += [grounded_messages("What are the treatments for?", PASSAGES)]
    expected = [log_p(grounded_messages(asked, PASSAGES)) - log_p(messages) for messages in left]
    named = prompt.words.index("Celiac disease")
    assert prompt.units[-2:] == ["[1]", "[2]"]
    found = explanation.leave_one_out(*lm, prompt, ANSWER)
    assert found[[-2, -1, named]] == pytest.approx(expected, abs=1e-3)


def test_shapley_sampling_averages_over_orders_of_joining(lm: Any, log_p: Any) -> None:
    """One permutation gives one of the six marginal vectors, two the mean of two of them."""
    prompt = Prompt("Is gout inherited")
    kept = [frozenset(s) for size in range(4) for s in itertools.combinations(range(3), size)]
    worth = {units: log_p(prompt.messages(units)) for units in kept}
    orders = []
    for order in itertools.permutations(range(3)):
        sums = [worth[frozenset(order[:n])] for n in range(4)]
        orders.append([sums[order.index(n) + 1] - sums[order.index(n)] for n in range(3)])
    pairs = [numpy.mean(pair, axis=0) for pair in itertools.product(orders, repeat=2)]

    def found(permutations: int, seed: int, candidates: Any) -> int:
        values = explanation.shapley(*lm, prompt, ANSWER, permutations, seed)
        assert values.sum() == pytest.approx(worth[kept[-1]] - worth[kept[0]], abs=1e-3)
        gaps = numpy.abs(numpy.array(candidates) - values).max(axis=1)
        assert gaps.min() < 1e-3
        return int(gaps.argmin())

    first, again = ([found(1, seed, orders) for seed in range(4)] for _ in "ab")
    assert first == again and len(set(first)) > 1, "seeded"
    found(2, 0, pairs)


@pytest.mark.parametrize("text", ["é?!., (a)'-b\n🙂 a<|>", "  b (🙂)?)", "a.b: c, d!?  "])
def test_units_cover_a_question(text: str) -> None:
    passages = [text[::-1], ""]
    prompt, turns = Prompt(text, passages), grounded_messages(text, passages)
    assert "".join(prompt.words) == prompt.text.replace(" ", "")
    assert prompt.messages(set())[-1]["content"] == ""
    assert prompt.messages(range(len(prompt.units))) == turns


def test_a_name_is_one_unit() -> None:
    named = Prompt("What is (are) Parkinson's disease ?", name="parkinson's Disease")
    assert named.words == ["What", "is", "(are)", "Parkinson's disease", "?"]
    with pytest.raises(CourseError, match="does not hold 'gout'"):
        Prompt(QUESTION, name="gout")


def test_the_page_shows_any_text_as_text(tmp_path: Path) -> None:
    row = {**build_sample.rows()[0], "answer": NASTY, "focus": NASTY, "source": NASTY, "url": NASTY}
    hits, prompt = [retrieval.Hit(row, 0.9)], Prompt(NASTY)
    supports = [retrieval.Support(NASTY, 0.7, hits[0], NASTY)]
    values, pulls = numpy.linspace(-1, 1, len(prompt.words)), numpy.array([0.25])
    answer, notes = Answer(NASTY, 9, True), ([NASTY], [NOTICE, NASTY])
    about = (prompt, answer, hits, supports, values, pulls, *notes)
    path = explanation.write_page(explanation.Explanation(*about), tmp_path / "new" / "page.html")
    page = Markup(path.read_text(encoding="utf-8"))
    assert not page.tags & {"script", "img", "b", "a"} and page.text.count(NASTY) >= 8
    for said in (NOTICE, "score 0.90", "pull +0.25", "-1.00", "not meaning"):
        assert said in page.text
    empty = (prompt, Answer("", 0, True), [], [], values, numpy.zeros(0), [], [NOTICE])
    explanation.write_page(explanation.Explanation(*empty), path)
    text = path.read_text(encoding="utf-8")
    assert "(the model said nothing)" in text and retrieval.NO_SOURCE in text


def test_medquad_explain_writes_a_page(tiny_adapter: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "runs" / "tiny" / "adapter")
    command = ["explain", "What are the symptoms of shingles?", "--profile", "tiny", "--runs"]
    command += [str(tmp_path / "runs"), "--out"]
    assert cli.main([*command, str(tmp_path / "page.html")]) == 0
    said, page = capsys.readouterr().out, Markup((tmp_path / "page.html").read_text())
    assert NOTICE in said and f"written: {tmp_path / 'page.html'}\n" in said
    assert said.count(str(tmp_path)) == 1, "no other path of this machine is said"
    cli._path("--out", "FILE.html", str(tmp_path / "page.html"))  # our own may be replaced
    assert "Shingles" in page.text and retrieval.COURSE_TEXT in page.text
    assert cli.main([*command, "page.pdf"]) == 1
    assert "ends in .html" in capsys.readouterr().err


def test_a_question_that_cannot_be_asked_is_refused(tiny_tokenizer: Any) -> None:
    for question, said in (
        ("\u2060\u200c", "is empty"),
        ("\u00ad?!", "is empty"),
        ("gout " * 20000, "too long"),
    ):
        with pytest.raises(CourseError, match=said):
            evaluation.check_question(question, tiny_tokenizer, 1024, 64)


def test_an_emergency_is_not_explained(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match=f"^{re.escape(safety.EMERGENCY)}$"):
        explanation.explain(tiny(tmp_path), "I can't breathe")
