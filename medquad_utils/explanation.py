"""Explain one answer: which words of the question, and which passages, raise its log-probability.

An attribution describes the model, not medicine. Every method scores one fixed answer by teacher
forcing, in nats (natural logarithm), summed over its tokens without the end of turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from medquad_utils import CourseError, chat, report, scores
from medquad_utils.evaluation import PASSAGE_WORDS, check_question, whole_archive
from medquad_utils.generation import Answer, ask, load_tokenizer, load_tuned
from medquad_utils.plots import shade
from medquad_utils.profiles import Plan
from medquad_utils.retrieval import NO_SOURCE, SUPPORT, Hit, Support, cite, dose_notes
from medquad_utils.safety import red_flag

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer

# An attribution: (model, tokenizer, prompt, answer) -> float64, shape (units,), in nats.
Values = numpy.ndarray
# A word, or the punctuation behind it.
UNIT = r"[^\s?!.,;:]+(?:[.,:][^\s?!.,;:]+)*|[?!.,;:]+"


class Prompt:
    """A question and its passages, cut into the units of an attribution: words, then passages.

    ``name``, a disease in the question, is one unit: half a name still tells the model which
    disease is meant. Passages are cut to ``PASSAGE_WORDS``.
    """

    def __init__(self, question: str, passages: Sequence[str] = (), name: str = ""):
        self.text = chat.without_tokens(chat.tidy_question(question))  # as the model reads it
        self.passages = [" ".join(passage.split()[:PASSAGE_WORDS]) for passage in passages]
        if name.lower() not in self.text.lower():
            raise CourseError(
                f"the question {self.text[:80]!r} does not hold {name!r}: "
                "give a name as the question writes it."
            )
        # With its brackets and endings, as in "(gout)", the name is one match; so is " gout".
        unit = rf"\S*?{re.escape(name)}[^\s?!.,;:]*|{UNIT}" if name else UNIT
        self._matches = list(re.finditer(f" ?(?:{unit})", self.text, re.IGNORECASE))
        self.words = [match[0].strip() for match in self._matches]
        self.units = [*self.words, *(f"[{n}]" for n in range(1, len(self.passages) + 1))]

    def messages(self, kept: Collection[int]) -> list[dict[str, str]]:
        """Return the turns before the answer with the ``kept`` units (their numbers) only.

        Other units are deleted with the space before them, and passages are numbered again.
        """
        question = "".join(match[0] for n, match in enumerate(self._matches) if n in kept)
        numbered = enumerate(self.passages, start=len(self.words))
        return chat.grounded_messages(question, [text for n, text in numbered if n in kept])


def log_probabilities(
    model: Model, tokenizer: Tokenizer, conversations: Sequence[Sequence[Mapping[str, str]]],
    answers: Sequence[str],
) -> Values:  # fmt: skip
    """Return log p(answer | conversation) of each pair in nats; float64, shape (pairs,)."""
    values: Values = -scores.answer_loss(model, tokenizer, conversations, answers).nats
    if not numpy.isfinite(values).all():
        raise CourseError(
            "an answer is empty, or longer with its prompt than the context of "
            f"{model.config.max_position_embeddings:,} tokens: give a text, or shorten it."
        )
    return values


def leave_one_out(model: Model, tokenizer: Tokenizer, prompt: Prompt, answer: str) -> Values:
    """Return the fall of log p(answer) without each unit, as captum's ``FeatureAblation``."""
    units = set(range(len(prompt.units)))
    turns = [prompt.messages(kept) for kept in (units, *(units - {n} for n in sorted(units)))]
    values = log_probabilities(model, tokenizer, turns, [answer] * len(turns))
    falls: Values = values[0] - values[1:]
    return falls


def shapley(
    model: Model, tokenizer: Tokenizer, prompt: Prompt, answer: str, permutations: int = 10,
    seed: int = 0,
) -> Values:  # fmt: skip
    """Return each unit's mean effect on log p(answer) when the units join in random orders.

    The values add up to log p(answer | all units) - log p(answer | none) (Castro et al., 2009;
    captum's ``ShapleyValueSampling`` does the same, one prompt at a time).
    """
    rng, count = numpy.random.default_rng(seed), len(prompt.units)
    orders = [rng.permutation(count) for _ in range(permutations)]
    turns = [prompt.messages(order[:n]) for order in orders for n in range(count + 1)]
    log_p = log_probabilities(model, tokenizer, turns, [answer] * len(turns))
    values = numpy.zeros(count)
    effects = numpy.diff(log_p.reshape(permutations, count + 1))
    for order, joined in zip(orders, effects, strict=True):
        values[order] += joined / permutations
    return values


@dataclass
class Explanation:
    """The content of the page."""

    prompt: Prompt
    answer: Answer
    hits: list[Hit]
    supports: list[Support]
    values: Values  # of each word, in nats
    pulls: Values  # of each hit in a prompt with all of them; none if it is too long
    doses: list[str]  # notes on the numbers of the answer that have a dose unit
    notices: list[str]  # what has to be read with the answer

    def __str__(self) -> str:
        order = numpy.argsort(-numpy.abs(self.values), kind="stable")[:5]
        top = ", ".join(f"{self.prompt.words[n]} {self.values[n]:+.2f}" for n in order)
        sources = [f"[{number}] {hit}" for number, hit in enumerate(self.hits, start=1)]
        lines = [self.answer.text, "", *self.doses, *self.notices, ""]
        return "\n".join([*lines, *(sources or [f"{NO_SOURCE}."]), f"depends on (nats): {top}"])


def explain(plan: Plan, question: str) -> Explanation:
    """Answer ``question`` with the plan's adapter, look up passages, and explain the answer.

    Raises CourseError if the question is empty or too long, or describes an emergency: what to do.
    """
    if flag := red_flag(question):
        raise CourseError(flag.message)
    tokenizer, model = load_tokenizer(plan), load_tuned(plan)
    context = int(model.config.max_position_embeddings)
    question = check_question(question, tokenizer, context, plan.max_new_tokens)
    answer = ask(model, tokenizer, [question], plan.max_new_tokens)[0]
    hits, supports = cite(whole_archive(plan, plan.folder / "adapter"), question, answer.text)
    prompt = Prompt(question)
    values, pulls = numpy.zeros(len(prompt.words)), numpy.zeros(0)
    if answer.text:
        values = leave_one_out(model, tokenizer, prompt, answer.text)
    if answer.text and hits:
        grounded = Prompt(question, [f"{hit.title}: {hit.row['answer']}" for hit in hits])
        with suppress(CourseError):  # too long for the context: the page shows no pulls
            pulls = leave_one_out(model, tokenizer, grounded, answer.text)[len(prompt.words) :]
    doses = dose_notes(answer.text, lambda: supports)
    notices = [chat.NOTICE, *filter(None, [plan.origin])]
    return Explanation(prompt, answer, hits, supports, values, pulls, doses, notices)


def write_page(explanation: Explanation, path: Path) -> Path:
    """Write the explanation as one HTML page."""
    largest = max(map(abs, explanation.values.tolist()), default=0.0)
    values = {
        "e": explanation, "title": f"Explained: {explanation.prompt.text[:80]}",
        "no_source": NO_SOURCE, "threshold": SUPPORT, "shade": lambda value: shade(value, largest),
    }  # fmt: skip
    return report.write_page(path, "page.html.jinja", values)
