"""Explain one answer: which words of the question, and which passages, raise its log-probability.

An attribution describes the model, not medicine. Every method scores one fixed answer by teacher
forcing, in nats (natural logarithm), summed over its tokens without the end of turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jinja2
import numpy
import pandas
import torch

from medquad_utils import CourseError, chat, scores
from medquad_utils.evaluation import PASSAGE_WORDS, check_question, whole_archive
from medquad_utils.files import whole_file
from medquad_utils.generation import Answer, ask, load_tokenizer, load_tuned
from medquad_utils.plots import shade
from medquad_utils.profiles import Plan
from medquad_utils.retrieval import NO_SOURCE, SUPPORT, Hit, Support, cite
from medquad_utils.safety import red_flag
from medquad_utils.scores import Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer

# An attribution: (model, tokenizer, prompt, answer) -> float64, shape (units,), in nats.
Values = numpy.ndarray
# A word, or the punctuation behind it.
UNIT = r"[^\s?!.,;:]+(?:[.,:][^\s?!.,;:]+)*|[?!.,;:]+"
MARK = "\u241f"  # stands for a turn's text in a rendered chat template; no text of ours holds it


class Prompt:
    """A question and its passages, cut into the units of an attribution: words, then passages.

    Punctuation is a unit of its own. ``name``, a disease in the question, is one unit, because half
    a name still tells the model which disease is meant. Passages are cut to ``PASSAGE_WORDS``.
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
        # The number of the unit that holds the name.
        self.named = next((n for n, w in enumerate(self.words) if name.lower() in w.lower()), 0)

    def messages(self, kept: Collection[int] | None = None) -> list[dict[str, str]]:
        """Return the turns before the answer with the ``kept`` units only (numbers; default: all).

        Other units are deleted with the space before them, and passages are numbered again.
        """
        if kept is None:
            kept = range(len(self.units))
        question = "".join(match[0] for n, match in enumerate(self._matches) if n in kept)
        numbered = enumerate(self.passages, start=len(self.words))
        return chat.grounded_messages(question, [text for n, text in numbered if n in kept])

    def tokens(self, tokenizer: Tokenizer) -> tuple[list[int], list[int | None]]:
        """Return the prompt's token ids and each token's unit, None for template and numbering.

        A token over two units ("?)") belongs to the first. Raises CourseError if the chat template
        changes the text of a turn.
        """
        messages = self.messages()
        content = messages[-1]["content"]
        marked = [*messages[:-1], {"role": "user", "content": MARK}]
        text, template = (
            tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            for turns in (messages, marked)
        )
        head = template.index(MARK)
        if not text.startswith(content, head):
            raise CourseError(
                "the tokenizer's chat template changes the text of a turn, so words have no place "
                "in it: use a template that keeps the text, such as chat.CHAT_TEMPLATE."
            )
        question = len(content) - len(self.text)  # the passages come before, a line each
        spans = [(question + m.start(), question + m.end()) for m in self._matches]
        lines = re.finditer(r"^\[\d+\] (.*)$", content[:question], re.MULTILINE)
        spans += [line.span(1) for line in lines]
        owners: list[int | None] = [None] * len(text)  # the unit of each character
        for unit, (start, end) in enumerate(spans):
            owners[head + start : head + end] = [unit] * (end - start)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], [
            next((owner for owner in owners[start:end] if owner is not None), None)
            for start, end in encoded["offset_mapping"]
        ]


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Return the token ids of the trimmed ``answer`` without the end of turn."""
    text = chat.without_tokens(answer.strip())
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise CourseError("the answer to explain is empty: expected some text.")
    return ids


def log_probabilities(
    model: Model, tokenizer: Tokenizer, conversations: Sequence[Sequence[Mapping[str, str]]],
    answers: Sequence[str],
) -> Values:  # fmt: skip
    """Return log p(answer | conversation) of each pair in nats; float64, shape (pairs,)."""
    values: Values = -scores.answer_loss(model, tokenizer, conversations, answers).nats
    if not numpy.isfinite(values).all():
        limit = model.config.max_position_embeddings
        raise CourseError(
            f"an answer is empty, or longer with its prompt than the context of {limit:,} tokens: "
            "give a text, or shorten it."
        )
    return values


# ---- attributions ---------------------------------------------------------------------------


def _log_p(
    model: Model, tokenizer: Tokenizer, prompt: Prompt, answer: str,
    subsets: Sequence[Collection[int]],
) -> Values:  # fmt: skip
    """log p(answer) of the prompt with each of the subsets of its units; equal ones run once."""
    sets = [frozenset(subset) for subset in subsets]
    different = list(dict.fromkeys(sets))
    turns = [prompt.messages(units) for units in different]
    values = log_probabilities(model, tokenizer, turns, [answer] * len(turns))
    log_p = dict(zip(different, values, strict=True))
    return numpy.array([log_p[units] for units in sets])


def leave_one_out(model: Model, tokenizer: Tokenizer, prompt: Prompt, answer: str) -> Values:
    """Return the fall of log p(answer) without each unit; above 0, the unit supports the answer.

    Equals captum's ``FeatureAblation``, but runs in batches.
    """
    units = set(range(len(prompt.units)))
    values = _log_p(model, tokenizer, prompt, answer, [units, *(units - {n} for n in units)])
    falls: Values = values[0] - values[1:]
    return falls


def shapley(
    model: Model, tokenizer: Tokenizer, prompt: Prompt, answer: str, permutations: int = 10,
    seed: int = 0,
) -> Values:  # fmt: skip
    """Return each unit's mean effect on log p(answer) when the units join in random orders.

    The values add up to log p(answer | all units) - log p(answer | none), for any number of
    ``permutations`` (Strumbelj and Kononenko, 2010; Castro et al., 2009). captum's
    ``ShapleyValueSampling`` does the same, one prompt at a time.
    """
    rng = numpy.random.default_rng(seed)
    count = len(prompt.units)
    orders = [rng.permutation(count) for _ in range(permutations)]
    joined = [set(order[:n]) for order in orders for n in range(count + 1)]
    log_p = _log_p(model, tokenizer, prompt, answer, joined).reshape(permutations, count + 1)
    values = numpy.zeros(count)
    for order, effects in zip(orders, numpy.diff(log_p), strict=True):
        values[order] += effects / permutations
    return values


def gradient(model: Model, tokenizer: Tokenizer, prompt: Prompt, answer: str) -> Values:
    """Return gradient x activation at the embeddings, summed over a unit's tokens.

    One forward and one backward pass (Shrikumar et al., 2016, arXiv 1605.01713); captum calls it
    ``LayerGradientXActivation``. It is the slope along the length of a word's vectors, and Llama
    normalises every vector that it reads. So the values are small, and their order does badly under
    ``faithfulness``.
    """
    ids, owners = prompt.tokens(tokenizer)
    target = torch.tensor(answer_ids(tokenizer, answer), device=model.device)
    inputs = torch.cat([torch.tensor(ids, device=model.device), target])[None]
    vectors = model.get_input_embeddings()(inputs).detach().requires_grad_()
    output = model(inputs_embeds=vectors, use_cache=False, logits_to_keep=len(target) + 1)
    rows = output.logits[0, :-1].float().log_softmax(-1)  # the row before a token predicts it
    log_p = rows.gather(-1, target[:, None]).sum()
    (slopes,) = torch.autograd.grad(log_p, vectors)
    tokens = (slopes * vectors)[0].float().sum(-1).tolist()  # the answer's come last
    values = numpy.zeros(len(prompt.units))
    for value, owner in zip(tokens, owners, strict=False):
        if owner is not None:
            values[owner] += value
    return values


METHODS: dict[str, Callable[..., Values]] = {
    "feature ablation": leave_one_out,
    "Shapley sampling": shapley,
    "gradient x activation": gradient,
}


def outranks(prompt: Prompt, values: Values) -> bool:
    """Return whether the prompt's ``name`` has the largest value of all words."""
    return int(numpy.argmax(values[: len(prompt.words)])) == prompt.named


def agreement(a: Values, b: Values) -> float:
    """Return Spearman's rank correlation, -1 to 1; 0 where one attribution is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if min(len(set(a)), len(set(b))) > 1 else 0.0


# ---- is it faithful? ------------------------------------------------------------------------


class Case(NamedTuple):
    """A prompt, its fixed answer, and the attribution under test, shape (words,) or (units,)."""

    prompt: Prompt
    answer: str
    values: Values


ORDERS = ("attribution", "leave-one-out", "random", "reverse")
MEASURES = ("comprehensiveness", "sufficiency")


def faithfulness(
    model: Model, tokenizer: Tokenizer, cases: Sequence[Case], most: int = 3, draws: int = 10,
    seed: int = 0,
) -> dict[str, dict[str, Values]]:  # fmt: skip
    """Test whether the answer depends on the words that an attribution ranks first.

    Comprehensiveness: the fall of log p(answer) without the first k words; high is good.
    Sufficiency: its fall with only the first k words; low is good. Both are means over k = 1 to
    ``most`` (DeYoung et al., 2020, arXiv 1911.03429, who use probabilities). Words are deleted from
    the text, which is tokenised again; passages stay. ``ORDERS`` ranks the words by attribution,
    by leave-one-out, at random (mean of ``draws``) and by attribution in reverse.

    Returns measure -> order -> float64, shape (cases,), in nats.
    """
    rng = numpy.random.default_rng(seed)
    frames = []
    for number, (prompt, answer, values) in enumerate(cases):
        alone = leave_one_out(model, tokenizer, prompt, answer)
        rankings = _rankings(prompt, values, alone, rng, draws)
        units = set(range(len(prompt.units)))
        rows = []
        for order, ranking in rankings:
            for k in range(1, min(most, len(ranking)) + 1):
                rows.append(("comprehensiveness", order, units - set(ranking[:k])))
                rows.append(("sufficiency", order, units - set(ranking[k:])))
        frame = pandas.DataFrame(rows, columns=["measure", "order", "kept"])
        log_p = _log_p(model, tokenizer, prompt, answer, [units, *frame["kept"]])
        frames.append(frame.assign(case=number, fall=log_p[0] - log_p[1:]))
    falls = pandas.concat(frames).groupby(["measure", "order", "case"])["fall"].mean()
    return {m: {o: falls[m, o].to_numpy() for o in ORDERS} for m in MEASURES}


def _rankings(
    prompt: Prompt, values: Values, alone: Values, rng: numpy.random.Generator, draws: int
) -> list[tuple[str, Values]]:
    """(order, numbers of the words, first to last) of each ranking that is compared."""
    count = len(prompt.words)
    if len(values) not in (count, len(prompt.units)):
        raise CourseError(
            f"{len(values)} values for {count} words of {prompt.text[:80]!r}: "
            "explain this very prompt first."
        )
    ranked, by_alone = (numpy.argsort(-v[:count], kind="stable") for v in (values, alone))
    fixed = [("attribution", ranked), ("leave-one-out", by_alone), ("reverse", ranked[::-1])]
    return fixed + [("random", rng.permutation(count)) for _ in range(draws)]


def faithfulness_intervals(
    results: Mapping[str, Mapping[str, Values]], seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Return the means of ``faithfulness`` with 95 % intervals, and paired differences.

    A faithful attribution has "attribution - random" above 0 in comprehensiveness and below 0 in
    sufficiency.
    """
    table: dict[str, dict[str, Interval]] = {}
    for measure, orders in results.items():
        table[measure] = {
            name: scores.interval(values, seed=seed) for name, values in orders.items()
        }
        for name in ORDERS[1:]:
            pair = orders[name], orders["attribution"]
            table[measure][f"attribution - {name}"] = scores.paired_interval(*pair, seed=seed)
    return table


class Swap(NamedTuple):
    """Two questions that differ in the disease; both attributions are of the *first* answer."""

    answer: str
    swapped_answer: str
    fall: float  # nats: log p(first answer | first question) - log p(it | swapped question)
    words: list[str]
    values: Values  # shape (words,)
    swapped_words: list[str]
    swapped_values: Values
    named: float  # the value of the name
    swapped_named: float


def swap(
    model: Model, tokenizer: Tokenizer, question: str, name: str, other: str,
    max_new_tokens: int = 64,
) -> Swap:  # fmt: skip
    """Ask ``question`` about ``name``, then about ``other``, and explain the first answer twice."""
    a = Prompt(question, name=name)
    place = a.text.lower().index(name.lower())
    b = Prompt(a.text[:place] + other + a.text[place + len(name) :], name=other)
    first, second = ask(model, tokenizer, [a.text, b.text], max_new_tokens)
    turns, answer = [a.messages(), b.messages()], first.text
    before, after = log_probabilities(model, tokenizer, turns, [answer] * 2)
    x, y = (leave_one_out(model, tokenizer, prompt, answer) for prompt in (a, b))
    fall, named, swapped = float(before - after), float(x[a.named]), float(y[b.named])
    return Swap(answer, second.text, fall, a.words, x, b.words, y, named, swapped)


def attention_map(
    model: Model, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], layer: int, head: int
) -> tuple[list[str], Values]:
    """Return a prompt's tokens and the weights of one attention head over them.

    Weights: fp32, shape (tokens, tokens), lower triangular, rows sum to 1. They say where the head
    read, not what the answer depends on (Jain and Wallace, 2019, arXiv 1902.10186).
    """
    attention = model.config._attn_implementation
    if attention != "eager":  # SDPA never holds these weights
        raise CourseError(
            f"attention {attention!r} keeps no weights: "
            'call model.set_attn_implementation("eager") first.'
        )
    ids = chat.prompt_ids(tokenizer, messages)
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        output = model(input_ids=inputs, output_attentions=True, use_cache=False)
    weights = output.attentions[layer][0, head].float().cpu().numpy()
    return [tokenizer.decode([i]) for i in ids], weights


# ---- the page -------------------------------------------------------------------------------


@dataclass
class Explanation:
    """The content of the page, in nats: ``values`` one a word, ``pulls`` one a passage of ``hits``.

    A pull is the fall of log p(answer) without that passage, in a prompt with all of them. There
    are none if that prompt is too long for the model.
    """

    prompt: Prompt
    answer: Answer
    hits: list[Hit]
    supports: list[Support]
    values: Values
    pulls: Values
    origin: str  # of the base's weights, see Plan.origin

    @property
    def notices(self) -> list[str]:
        """What has to be read with the answer; an emergency comes first."""
        flag = red_flag(self.prompt.text)
        notices = (flag and flag.message, chat.NOTICE, self.origin)
        return [notice for notice in notices if notice]

    def __str__(self) -> str:
        """Format for a terminal: answer, notices, sources, words with the largest values."""
        order = numpy.argsort(-numpy.abs(self.values), kind="stable")[:5]
        top = ", ".join(f"{self.prompt.words[n]} {self.values[n]:+.2f}" for n in order)
        sources = [f"[{number}] {hit}" for number, hit in enumerate(self.hits, start=1)]
        notice = self.notices.index(chat.NOTICE)  # an emergency message comes before the answer
        lines = [*self.notices[:notice], self.answer.text, "", *self.notices[notice:], ""]
        return "\n".join([*lines, *(sources or [f"{NO_SOURCE}."]), f"depends on (nats): {top}"])


def explain(plan: Plan, question: str) -> Explanation:
    """Answer ``question`` with the plan's adapter, look up passages, and explain the answer."""
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
    return Explanation(prompt, answer, hits, supports, values, pulls, plan.origin)


def write_page(explanation: Explanation, path: Path) -> Path:
    """Write one HTML page without scripts or links to load; every text in it is escaped."""
    assets = jinja2.FileSystemLoader(Path(__file__).parent / "assets")
    page = jinja2.Environment(loader=assets, autoescape=True, undefined=jinja2.StrictUndefined)
    largest = max(map(abs, explanation.values.tolist()), default=0.0)
    text = page.get_template("page.html.jinja").render(
        e=explanation, title=f"Explained: {explanation.prompt.text[:80]}", no_source=NO_SOURCE,
        threshold=SUPPORT, shade=lambda value: shade(value, largest),
    )  # fmt: skip
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
