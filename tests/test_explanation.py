"""Sources for sentences, attributions against hand-computed leave-one-out, faithfulness by deletion, and the page."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import NASTY, Markup
from hypothesis import given
from hypothesis import strategies as st

from medquad_utils import explanation, generation, retrieval
from medquad_utils.assets import sample
from medquad_utils.chat import NOTICE, grounded_messages, prompt_ids, prompt_messages
from medquad_utils.explanation import Case, Prompt
from medquad_utils.generation import Answer
from medquad_utils.profiles import CourseError, Hardware, Plan, resolve

QUESTION, NAME = "What are the treatments for Celiac disease ?", "celiac disease"
ANSWER = "Treatment for celiac disease can include a gluten-free diet."
PASSAGES = ("Celiac disease: Eat no gluten.", "Gout: Rest the joint.")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return resolve("tiny", hardware=Hardware("cpu", "any", 16.0, cores=2))


@pytest.fixture(scope="module")
def tokenizer(plan: Plan) -> Any:
    return generation.load_tokenizer(plan)


@pytest.fixture(scope="module")
def model(plan: Plan, tiny_adapter: Path) -> Any:
    """The 4-bit base with an adapter of random weights: what is tested holds for any weights."""
    return generation.load_tuned(plan, tiny_adapter)


@pytest.fixture(scope="module")
def index() -> retrieval.Index:
    return retrieval.Index(sample.rows())


def by_hand(model: Any, tokenizer: Any, messages: list[dict[str, str]], answer: str) -> float:
    """log p(answer | messages), one forward pass and no code of the package's scores."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer))
    with torch.no_grad():
        found = model(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return sum(float(found[len(before) + n - 1, token]) for n, token in enumerate(after))


# ---- attributions ---------------------------------------------------------------------------------------------------


def test_feature_ablation_is_leave_one_out_by_hand(model: Any, tokenizer: Any) -> None:
    """Every prompt without one word is typed out here; captum's own default would give other numbers."""
    without = (
        "are treatments for Celiac disease?", "What treatments for Celiac disease?", "What are for Celiac disease?",
        "What are treatments Celiac disease?", "What are treatments for disease?", "What are treatments for Celiac?",
        "What are treatments for Celiac disease",
    )  # fmt: skip
    whole = by_hand(model, tokenizer, prompt_messages("What are treatments for Celiac disease?"), ANSWER)
    expected = [whole - by_hand(model, tokenizer, prompt_messages(text), ANSWER) for text in without]
    prompt = Prompt("What are treatments for Celiac disease ?")
    assert prompt.words == ["What", "are", "treatments", "for", "Celiac", "disease", "?"]
    assert explanation.ablation(model, tokenizer, prompt, ANSWER) == pytest.approx(expected, abs=1e-3)
    assert explanation.leave_one_out(model, tokenizer, prompt, ANSWER) == pytest.approx(expected, abs=1e-3)
    assert numpy.abs(expected).max() > 0.05, "the comparison would hold for zeros too"


def test_a_passage_is_a_unit_and_leaving_it_out_numbers_the_others_anew(model: Any, tokenizer: Any) -> None:
    prompt = Prompt(QUESTION, PASSAGES, NAME)
    asked = "What are the treatments for Celiac disease?"
    whole = by_hand(model, tokenizer, grounded_messages(asked, PASSAGES), ANSWER)
    lone = [by_hand(model, tokenizer, grounded_messages(asked, [text]), ANSWER) for text in reversed(PASSAGES)]
    nameless = by_hand(model, tokenizer, grounded_messages("What are the treatments for?", PASSAGES), ANSWER)
    found = explanation.ablation(model, tokenizer, prompt, ANSWER)
    assert prompt.units[prompt.named] == "Celiac disease"
    assert prompt.units[-2:] == ["[1]", "[2]"]
    assert found[[-2, -1, prompt.named]] == pytest.approx([whole - lone[0], whole - lone[1], whole - nameless], abs=1e-3)


def test_shapley_sampling_averages_over_orders_of_joining(model: Any, tokenizer: Any) -> None:
    """By brute force: one permutation must give one of the six marginal vectors, two permutations the mean of two of them."""
    prompt = Prompt("Is gout inherited")
    units = range(len(prompt.units))
    subsets = [frozenset(kept) for size in range(4) for kept in itertools.combinations(units, size)]
    worth = {kept: by_hand(model, tokenizer, prompt.messages(kept), ANSWER) for kept in subsets}

    def joining(order: tuple[int, ...]) -> list[float]:
        steps = {unit: worth[frozenset(order[: n + 1])] - worth[frozenset(order[:n])] for n, unit in enumerate(order)}
        return [steps[unit] for unit in units]

    orders = numpy.array([joining(order) for order in itertools.permutations(units)])

    def nearest(candidates: Any, found: numpy.ndarray) -> tuple[int, float]:
        gaps = numpy.abs(candidates - found).max(axis=1)
        return int(gaps.argmin()), float(gaps.min())

    single = [nearest(orders, explanation.shapley(model, tokenizer, prompt, ANSWER, 1, seed)) for seed in range(4)]
    assert max(gap for _, gap in single) < 1e-3
    assert len({order for order, _ in single}) > 1, "the seed chooses the order"
    pair = explanation.shapley(model, tokenizer, prompt, ANSWER, 2)
    assert nearest(((orders[:, None] + orders[None]) / 2).reshape(-1, 3), pair)[1] < 1e-3
    assert pair.sum() == pytest.approx(worth[frozenset(units)] - worth[frozenset()], abs=1e-3)
    assert explanation.shapley(model, tokenizer, prompt, ANSWER, 2) == pytest.approx(pair), "seeded"


def test_gradient_times_activation_is_the_slope_along_each_words_vectors(model: Any, tokenizer: Any) -> None:
    """Shrinking one word's embeddings by a hair changes log p by the attribution times that hair."""
    prompt = Prompt(QUESTION, name=NAME)
    ids, owners = prompt.tokens(tokenizer)
    target = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    vectors = model.get_input_embeddings()(torch.tensor([ids + target])).detach()

    def log_p(scale: torch.Tensor) -> float:
        with torch.no_grad():
            found = model(inputs_embeds=vectors * scale[None, :, None]).logits[0].double().log_softmax(-1)
        return sum(float(found[len(ids) + n - 1, token]) for n, token in enumerate(target))

    expected = []
    for unit in range(len(prompt.units)):
        step = torch.zeros(len(ids) + len(target))
        step[: len(ids)] = torch.tensor([0.01 if owner == unit else 0.0 for owner in owners])
        expected.append((log_p(1 + step) - log_p(1 - step)) / 0.02)
    assert explanation.gradient(model, tokenizer, prompt, ANSWER) == pytest.approx(expected, abs=0.01, rel=0.03)
    assert numpy.abs(expected).max() > 0.02


def test_a_contrast_is_one_attribution_less_the_other(model: Any, tokenizer: Any) -> None:
    prompt, foil = Prompt("What causes gout?"), "Known causes of gout are cold feet."
    found = explanation.contrast(explanation.leave_one_out, model, tokenizer, prompt, ANSWER, foil)
    texts = ["What causes gout?", "causes gout?", "What gout?", "What causes?", "What causes gout"]
    gaps = [by_hand(model, tokenizer, prompt_messages(t), ANSWER) - by_hand(model, tokenizer, prompt_messages(t), foil) for t in texts]
    assert found == pytest.approx(gaps[0] - numpy.array(gaps[1:]), abs=1e-3)


def test_attributions_change_with_the_adapter(model: Any, tokenizer: Any) -> None:
    prompt = Prompt(QUESTION)
    on = explanation.leave_one_out(model, tokenizer, prompt, ANSWER)
    with model.disable_adapter():
        off = explanation.leave_one_out(model, tokenizer, prompt, ANSWER)
    assert numpy.abs(on - off).max() > 0.05
    assert explanation.leave_one_out(model, tokenizer, prompt, ANSWER) == pytest.approx(on), "and it is on again"


def test_a_swapped_disease_is_asked_and_explained(model: Any, tokenizer: Any) -> None:
    found = explanation.swap(model, tokenizer, QUESTION, NAME, "gout", max_new_tokens=6)
    first, second = "What are the treatments for Celiac disease?", "What are the treatments for gout?"
    assert [a.text for a in generation.ask(model, tokenizer, [first, second], 6)] == [found.answer, found.swapped_answer]
    log_p = [by_hand(model, tokenizer, prompt_messages(text), found.answer) for text in (first, second)]
    assert found.fall == pytest.approx(log_p[0] - log_p[1], abs=1e-3)
    assert (found.words[5], found.swapped_words[5]) == ("Celiac disease", "gout")
    assert (found.named, found.swapped_named) == (found.values[5], found.swapped_values[5])


@pytest.mark.parametrize(
    ("answer", "said"), [("  ", "answer to explain is empty"), ("gout " * 1100, "the model reads 1,024")], ids=["empty", "long"]
)
def test_an_answer_that_cannot_be_scored_is_refused(model: Any, tokenizer: Any, answer: str, said: str) -> None:
    for method in (explanation.ablation, explanation.gradient):
        with pytest.raises(CourseError, match=said):
            method(model, tokenizer, Prompt(QUESTION), answer)
    with pytest.raises(CourseError, match="empty, or longer"):
        explanation.leave_one_out(model, tokenizer, Prompt(QUESTION), answer)


# ---- units ----------------------------------------------------------------------------------------------------------

texts = st.text(st.sampled_from("ab é?!., ()'-<|>\n🙂"), max_size=24)


@given(question=texts, passages=st.lists(texts, max_size=2))
def test_units_cover_the_question_and_every_token_of_it_has_one(tokenizer: Any, question: str, passages: list[str]) -> None:
    try:
        prompt = Prompt(question, passages)
    except CourseError:
        assert not question.strip()
        return
    everything = set(range(len(prompt.units)))
    assert "".join(prompt.words) == prompt.text.replace(" ", "")
    assert prompt.messages(everything) == prompt.messages() == grounded_messages(question, passages)
    ids, owners = prompt.tokens(tokenizer)
    assert ids == prompt_ids(tokenizer, grounded_messages(question, passages))
    held = "".join(tokenizer.decode([i for i, owner in zip(ids, owners, strict=True) if owner is not None and owner < len(prompt.words)]))
    assert held.replace(" ", "").strip() == prompt.text.replace(" ", "")
    empty = prompt.messages(set())[-1]["content"]
    assert empty == ""


def test_a_word_owns_its_tokens_inside_the_template(tokenizer: Any) -> None:
    prompt = Prompt("a?", PASSAGES)  # the letter stands in the template, the system turn and the passages too
    ids, owners = prompt.tokens(tokenizer)
    own = {unit: tokenizer.decode([i for i, o in zip(ids, owners, strict=True) if o == n]) for n, unit in enumerate(prompt.units)}
    assert {unit: text.strip() for unit, text in own.items()} == {"a": "a", "?": "?", "[1]": PASSAGES[0], "[2]": PASSAGES[1]}


def test_a_name_is_one_unit_however_it_is_written() -> None:
    assert Prompt("What is (are) Parkinson's disease ?", name="parkinson's Disease").words == [
        "What",
        "is",
        "(are)",
        "Parkinson's disease",
        "?",
    ]
    assert Prompt("Who is at risk for A, B?", name="A, B").words == ["Who", "is", "at", "risk", "for", "A, B", "?"]
    with pytest.raises(CourseError, match="does not hold 'gout'"):
        Prompt(QUESTION, name="gout")
    with pytest.raises(CourseError, match="question is empty"):
        Prompt(" \n")


def test_the_name_outranks_only_with_the_largest_value() -> None:
    prompt = Prompt("What causes gout?", name="gout")
    assert explanation.outranks(prompt, numpy.array([1.0, 2.0, 3.0, 0.0]))
    assert not explanation.outranks(prompt, numpy.array([1.0, 3.5, 3.0, 0.0]))
    assert explanation.agreement(numpy.array([1, 2, 3]), numpy.array([1, 4, 9])) == pytest.approx(1)
    assert explanation.agreement(numpy.array([1, 2, 3]), numpy.array([3, 2, 1])) == pytest.approx(-1)
    assert explanation.agreement(numpy.array([1, 1, 1]), numpy.array([3, 2, 1])) == 0


# ---- faithfulness ---------------------------------------------------------------------------------------------------


def test_faithfulness_deletes_the_first_words_and_is_right_by_hand(model: Any, tokenizer: Any) -> None:
    values = numpy.array([0.0, 1.0, 3.0, 2.0])  # gout, ?, causes, What
    found = explanation.faithfulness(model, tokenizer, [Case(Prompt("What causes gout?"), ANSWER, values)], most=2, draws=3)

    def log_p(text: str) -> float:
        return by_hand(model, tokenizer, prompt_messages(text), ANSWER)

    whole = log_p("What causes gout?")
    assert found["comprehensiveness"]["attribution"] == pytest.approx(
        [whole - (log_p("What causes?") + log_p("What causes")) / 2], abs=1e-3
    )
    assert found["sufficiency"]["attribution"] == pytest.approx([whole - (log_p("gout") + log_p("gout?")) / 2], abs=1e-3)
    assert found["comprehensiveness"]["reverse"] == pytest.approx([whole - (log_p("causes gout?") + log_p("gout?")) / 2], abs=1e-3)
    alone = explanation.leave_one_out(model, tokenizer, Prompt("What causes gout?"), ANSWER)
    best = explanation.faithfulness(model, tokenizer, [Case(Prompt("What causes gout?"), ANSWER, alone)], most=1)
    assert best["comprehensiveness"]["attribution"] == pytest.approx([alone.max()], abs=1e-3), "no single word costs more"
    assert best["comprehensiveness"]["leave-one-out"] == pytest.approx(best["comprehensiveness"]["attribution"])
    assert best["comprehensiveness"]["reverse"] == pytest.approx([alone.min()], abs=1e-3)


def test_intervals_are_paired() -> None:
    values = {name: numpy.array([1.0, 5.0, 9.0]) + shift for name, shift in zip(explanation.ORDERS, (1.0, 1.0, 0.0, -1.0), strict=True)}
    found = explanation.faithfulness_intervals({"comprehensiveness": values})["comprehensiveness"]
    assert found["attribution - random"] == pytest.approx((1, 1, 1))
    assert found["attribution - reverse"] == pytest.approx((2, 2, 2))
    low, high = found["attribution"][1:]
    assert low < 6 < high


def test_faithfulness_refuses_what_does_not_fit(model: Any, tokenizer: Any) -> None:
    with pytest.raises(CourseError, match="at least one case"):
        explanation.faithfulness(model, tokenizer, [])
    with pytest.raises(CourseError, match="2 values for 4 words"):
        explanation.faithfulness(model, tokenizer, [Case(Prompt("What causes gout?"), ANSWER, numpy.zeros(2))])


# ---- attention ------------------------------------------------------------------------------------------------------


def test_an_attention_map_looks_back_and_sums_to_one(plan: Plan, tokenizer: Any, model: Any, tiny_adapter: Path) -> None:
    messages = prompt_messages("What causes gout?")
    with pytest.raises(CourseError, match="eager attention only"):
        explanation.attention_map(model, tokenizer, messages, 0, 0)
    eager = generation.load_tuned(dataclasses.replace(plan, attention="eager"), tiny_adapter)
    tokens, weights = explanation.attention_map(eager, tokenizer, messages, 3, 7)
    assert weights.shape == (len(tokens), len(tokens)) == (len(prompt_ids(tokenizer, messages)),) * 2
    assert weights.sum(1) == pytest.approx(numpy.ones(len(tokens)), abs=1e-4)
    assert not numpy.triu(weights, 1).any()
    assert not numpy.allclose(weights, explanation.attention_map(eager, tokenizer, messages, 0, 0)[1])
    for layer, head in ((4, 0), (0, 8), (-1, 0)):
        with pytest.raises(CourseError, match="4 layers of 8 heads"):
            explanation.attention_map(eager, tokenizer, messages, layer, head)


# ---- sources --------------------------------------------------------------------------------------------------------


def test_sentences_end_where_they_end() -> None:
    text = "Take care, e.g. Rest. See Dr. Who! Is 1.5 mg safe?  (Yes.) \nNo full stop"
    assert explanation.sentences(text) == ["Take care, e.g. Rest.", "See Dr. Who!", "Is 1.5 mg safe?", "(Yes.)", "No full stop"]
    assert explanation.sentences(" \n ") == []


def test_support_is_the_weighted_share_of_words(index: retrieval.Index) -> None:
    passage = "It is rare. Gout is treated with colchicine and rest."
    score, evidence = explanation.support(index, "Colchicine cures gout", "Gout", passage)
    weight = {word: index.mass([word]) for word in ("colchicine", "cures", "gout")}
    assert score == pytest.approx((weight["colchicine"] + weight["gout"]) / sum(weight.values()))
    assert evidence == "Gout is treated with colchicine and rest."
    assert explanation.support(index, "Rest, gout!", "Gout", passage)[0] == pytest.approx(1)
    assert explanation.support(index, "Zebras", "Gout", passage)[0] == explanation.support(index, "...", "Gout", passage)[0] == 0


def test_an_answer_is_cited_sentence_by_sentence(index: retrieval.Index) -> None:
    row = next(r for r in index.rows if r["focus"] and r["qtype"] == "treatment")
    answer = f"{row['answer']} Zebras dance gladly at midnight."
    hits, (known, unknown) = explanation.cite(index, row["question"], answer)
    assert 1 <= len(hits) <= explanation.PASSAGES
    assert known.hit is not None
    assert known.hit.row["answer"] == row["answer"]
    assert (known.score, known.evidence) == (pytest.approx(1), known.sentence)
    assert unknown.hit is None and unknown.score < explanation.SUPPORT and unknown.evidence == ""
    assert explanation.cite(index, "What causes zebra fever?", answer)[0] == []
    assert [s.hit for s in explanation.cite(index, "What causes zebra fever?", answer)[1]] == [None, None]


def test_few_sentences_about_other_diseases_find_a_source(index: retrieval.Index) -> None:
    """The threshold holds on the sample: at most a twentieth of the sentences get a source among passages on another disease."""
    rows = [row for row in index.rows if row["focus"]]
    strangers = [
        [retrieval.Hit(other, 1.0) for other in rows[n + 300 :: 97] if other["focus"] != row["focus"]][:3] for n, row in enumerate(rows)
    ]
    pairs = [(row["answer"], hits) for row, hits in zip(rows, strangers, strict=True) if hits][::3]
    found = explanation.calibrate_support(index, [a for a, _ in pairs], [h for _, h in pairs])
    assert found <= explanation.SUPPORT
    scores = [s.score for answer, hits in pairs for s in explanation.supports(index, answer, hits)]
    assert sum(score >= found for score in scores) <= 0.05 * len(scores)
    with pytest.raises(CourseError, match="needs sentences"):
        explanation.calibrate_support(index, [], [])


# ---- the page -------------------------------------------------------------------------------------------------------


class _Page(Markup):
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs), "nothing to load, nothing to run"


def test_the_page_shows_any_text_as_text(index: retrieval.Index, tmp_path: Path) -> None:
    row = {**index.rows[0], "answer": NASTY, "focus": NASTY, "source": NASTY, "url": NASTY}
    hit, prompt = retrieval.Hit(row, 0.9), Prompt(NASTY)
    support = explanation.Support(NASTY, 0.7, hit, NASTY)
    found = explanation.Explanation(
        prompt, Answer(NASTY, 9, True), [hit], [support], numpy.linspace(-1, 1, len(prompt.words)), numpy.array([0.25]), True
    )
    path = explanation.write_page(found, tmp_path / "new" / "page.html")
    page = _Page(path.read_text(encoding="utf-8"))
    assert not page.tags & {"script", "img", "b", "a"}
    assert page.text.count(NASTY) >= 7
    for said in (NOTICE, "embedded tiny model", "score 0.90", "pull +0.25", "-1.00", "not meaning"):
        assert said in page.text
    assert str(found).count(NASTY) >= 2


def test_a_page_without_an_answer_or_a_source_says_so(tmp_path: Path) -> None:
    prompt = Prompt("What causes zebra fever?")
    found = explanation.Explanation(prompt, Answer("", 0, True), [], [], numpy.zeros(5), numpy.zeros(0), False)
    text = _Page(explanation.write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "(the model said nothing)" in text
    assert retrieval.NO_SOURCE in text


@pytest.mark.parametrize(("question", "said"), [("\u200b \x00", "question is empty"), ("gout " * 20000, "too long")], ids=["empty", "long"])
def test_a_question_that_cannot_be_asked_is_refused(tokenizer: Any, question: str, said: str) -> None:
    with pytest.raises(CourseError, match=said) as raised:
        explanation.check_question(question, tokenizer, 1024, 64)
    assert len(str(raised.value)) < 200


def test_the_whole_way_from_a_question_to_its_page(tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medquad_utils import cli

    runs, out = tmp_path / "runs", tmp_path / "page.html"
    shutil.copytree(tiny_adapter, runs / "tiny" / "adapter")
    asked = "What are the symptoms of shingles?"
    assert cli.main(["explain", asked, "--profile", "tiny", "--runs", str(runs), "--out", str(out)]) == 0
    said, page = capsys.readouterr().out, _Page(out.read_text(encoding="utf-8"))
    assert NOTICE in said and "written: page.html" in said and str(tmp_path) not in said
    assert "Shingles" in page.text and retrieval.COURSE_TEXT in page.text
    assert all(re.search(rf"{word}[+-]\d+\.\d\d", page.text) for word in ("symptoms", "shingles"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("  ",), 'medquad explain "What causes asthma?"'), (("What causes gout?", "--out", "page.pdf"), "ends in .html")],
    ids=["empty", "pdf"],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from medquad_utils import cli

    assert cli.main(["explain", *arguments, "--profile", "tiny"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
