"""Where an answer could come from, and what in the question moved it: sources for each sentence, attributions, their faithfulness.

Two different things, never to be mixed up. *Sources* are passages of the archive that were found after the answer; a sentence with
a close source may still be wrong, and the model has not read them. *Attributions* say how much each word of the question, or each
passage in the prompt, raises the log-probability of one fixed answer: they are about the model, not about medicine.

Everything that scores an answer counts its own tokens, in nats (natural logarithm), by teacher forcing; the end of turn is left out.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from medquad_utils import CourseError, scores
from medquad_utils.arms import archive_index
from medquad_utils.chat import (
    NOTICE,
    grounded_messages,
    prompt_ids,
    prompt_messages,
    tidy_question,
    without_tokens,
)
from medquad_utils.evaluation import training_rows
from medquad_utils.files import whole_file
from medquad_utils.generation import Answer, ask, load_tokenizer, load_tuned
from medquad_utils.plots import shade
from medquad_utils.profiles import Plan
from medquad_utils.questions import CONTROL, PASSAGE_WORDS
from medquad_utils.report import EMBEDDED, document, html_table
from medquad_utils.retrieval import NO_SOURCE, Hit, Index, words
from medquad_utils.safety import red_flag
from medquad_utils.scores import Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PASSAGES = 3  # under an answer, at most
# A sentence whose best passage scores less has no close source. Of 1,462 sentences about diseases held out of the real MedQuAD, a
# tenth reach it in passages about the nearest other diseases; half of those stand there word for word.
SUPPORT = 0.6
UNIT = re.compile(
    r"[^\s?!.,;:]+(?:[.,:][^\s?!.,;:]+)*|[?!.,;:]+"
)  # a word, or the punctuation behind it
MARK = "\u241f"  # stands for a turn's text in a rendered template; no text of ours holds it
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]?[A-Z0-9])|\n+")
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|Dr|Mr|Mrs|Ms|St|No|approx|[A-Z])\.)$")

# ---- sources --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Support:
    """A sentence of an answer with the passage that shares most with it; ``hit`` is None where no close passage shares enough."""

    sentence: str
    score: float  # 0 to 1, of the best passage, also where it is under the threshold
    hit: Hit | None
    evidence: str  # the sentence of that passage


def sentences(text: str) -> list[str]:
    """The sentences of ``text``; abbreviations such as "e.g." end none, line breaks do."""
    found: list[str] = []
    for part in SENTENCE_END.split(text):
        if found and ABBREVIATION.search(found[-1]):
            found[-1] += f" {part.strip()}"
        elif part.strip():
            found.append(part.strip())
    return found


def support(index: Index, sentence: str, title: str, passage: str) -> tuple[float, str]:
    """How much of ``sentence`` stands in one sentence of ``passage``: (score, that sentence).

    The score is lexical: the share of the sentence's different words, weighted by inverse document frequency in the archive,
    that the passage's sentence, or its title, holds. 0: no word, 1: every word. It sees neither a "not" nor the order of words,
    and a paraphrase scores low. A sentence without a word scores 0.
    """
    said, name = set(words(sentence)), set(words(title))
    whole = index.mass(said)
    scored = [
        (index.mass(said & (name | set(words(text)))) / whole if said else 0.0, text)
        for text in sentences(passage)
    ]
    return max(scored, key=lambda pair: pair[0], default=(0.0, ""))


def supports(
    index: Index, answer: str, hits: Sequence[Hit], threshold: float = SUPPORT
) -> list[Support]:
    """Each sentence of ``answer`` with its best supporting passage of ``hits`` (see ``support``); the first of equals."""
    found = []
    for sentence in sentences(answer):
        scored = [(*support(index, sentence, hit.title, hit.row["answer"]), hit) for hit in hits]
        score, evidence, best = max(scored, key=lambda item: item[0], default=(0.0, "", None))
        close = score >= threshold
        found.append(Support(sentence, score, best if close else None, evidence if close else ""))
    return found


def cite(
    index: Index, question: str, answer: str, k: int = PASSAGES, threshold: float = SUPPORT
) -> tuple[list[Hit], list[Support]]:
    """The at most ``k`` passages to show under ``answer``, and the support of each of its sentences.

    Only passages that are close to the question are shown (``Index.close``): none at all where the archive does not know
    the disease, and then no sentence has a source.
    """
    hits = index.close(index.search([question], k)[0])
    return hits, supports(index, answer, hits, threshold)


def whole_archive(plan: Plan, adapter: Path) -> Index:
    """All rows of the data that ``adapter`` was trained on: citing a row is no leak, training on it was decided before.

    Raises:
        CourseError: what ``evaluation.training_rows`` raises.
    """
    train, validation, test = (
        training_rows(plan, adapter, part=part) for part in ("train", "validation", "test")
    )
    return archive_index(train, [*validation, *test], validation)


def calibrate_support(
    index: Index, texts: Sequence[str], strangers: Sequence[Sequence[Hit]], share: float = 0.05
) -> float:
    """The lowest threshold at which at most ``share`` of the sentences of ``texts`` get a source among ``strangers``.

    ``strangers`` are for each text passages that must not support it (about other diseases).

    Raises:
        CourseError: no sentence.
    """
    best = [
        s.score
        for text, hits in zip(texts, strangers, strict=True)
        for s in supports(index, text, hits)
    ]
    if not best:
        raise CourseError(
            "a threshold needs sentences and passages about other diseases: got none."
        )
    highest = sorted(best, reverse=True)[int(share * len(best))]
    return float(numpy.nextafter(highest, 2))


# ---- a prompt in units that can be left out ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A question, and passages before it, cut into the units that attributions are about: words first, then passages.

    Punctuation is a unit of its own. ``name``, a disease in the question, makes one unit of its words: with half of a name
    left the model still knows which disease is meant. Passages are cut as in a grounded prompt (``PASSAGE_WORDS``).

    Raises:
        CourseError: the question is empty, or does not hold ``name``.
    """

    question: str
    passages: Sequence[str] = ()
    name: str = ""
    text: str = field(init=False)  # the question as the model reads it

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", without_tokens(tidy_question(self.question)))
        short = tuple(
            without_tokens(" ".join(passage.split()[:PASSAGE_WORDS])) for passage in self.passages
        )
        object.__setattr__(self, "passages", short)
        if not self.text:
            raise CourseError(
                'the question is empty: expected a text such as "What causes asthma?".'
            )
        if self.name and self.name.lower() not in self.text.lower():
            raise CourseError(
                f"the question {self.text[:80]!r} does not hold {self.name!r}: give a name as the question writes it."
            )

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of each word's characters in ``text``."""
        found = [match.span() for match in UNIT.finditer(self.text)]
        if not self.name:
            return found
        start = self.text.lower().index(self.name.lower())
        inside = [span for span in found if span[0] < start + len(self.name) and span[1] > start]
        one = (inside[0][0], inside[-1][1])
        return sorted({one, *found} - set(inside) | {one})

    @property
    def words(self) -> list[str]:
        """The question's units, in reading order."""
        return [self.text[start:end] for start, end in self.spans]

    @property
    def units(self) -> list[str]:
        """All units: the words, then "[1]", "[2]" for the passages."""
        return [*self.words, *(f"[{number}]" for number in range(1, len(self.passages) + 1))]

    @property
    def named(self) -> int:
        """The number of the unit that holds the first word of ``name``."""
        start = self.text.lower().index(self.name.lower())
        return next(n for n, span in enumerate(self.spans) if span[0] <= start < span[1])

    def messages(self, kept: Collection[int] | None = None) -> list[dict[str, str]]:
        """The turns before the answer with the ``kept`` units (numbers; default: all) and without the others.

        What is left out is gone, with the space before it: nothing stands in its place, and passages are numbered anew.
        """
        if kept is None:
            return grounded_messages(self.text, self.passages)
        question = "".join(self._spaced(*span) for n, span in enumerate(self.spans) if n in kept)
        passages = [
            text for n, text in enumerate(self.passages, start=len(self.spans)) if n in kept
        ]
        return grounded_messages(question, passages)

    def _spaced(self, start: int, end: int) -> str:
        return self.text[start - (start > 0 and self.text[start - 1] == " ") : end]

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int | None]]:
        """(token ids of the whole prompt, the unit of each token); None for the template, the system turn and the numbering.

        A token that reaches over two units ("?)") belongs to the one that has more of its characters, the first of equals.

        Raises:
            CourseError: the chat template changes the text of a turn, so that characters cannot be told apart.
        """
        messages = self.messages()
        content = messages[-1]["content"]
        turns = [*messages[:-1], {"role": "user", "content": MARK}]
        head, _, tail = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        ).partition(MARK)
        encoded = tokenizer(
            f"{head}{content}{tail}", add_special_tokens=False, return_offsets_mapping=True
        )
        if list(encoded["input_ids"]) != prompt_ids(tokenizer, messages):
            raise CourseError(
                "the tokenizer's chat template rewrites what a turn says: words cannot be found again in it."
            )
        places = [(start + len(head), end + len(head)) for start, end in self._places(content)]

        def unit(start: int, end: int) -> int | None:
            shared = [min(end, stop) - max(start, begin) for begin, stop in places]
            return shared.index(max(shared)) if shared and max(shared) > 0 else None

        return list(encoded["input_ids"]), [unit(*span) for span in encoded["offset_mapping"]]

    def _places(self, content: str) -> list[tuple[int, int]]:
        """(start, end) of each unit in the text of the user's turn."""
        question = len(content) - len(self.text)
        places, at = (
            [(question + start, question + end) for start, end in self.spans],
            content.index("\n") + 1 if self.passages else 0,
        )
        for number, text in enumerate(self.passages, start=1):
            at += len(f"[{number}] ")
            places.append((at, at + len(text)))
            at += len(text) + 1
        return places


# ---- attributions ---------------------------------------------------------------------------------------------------


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of ``answer`` as ``scores.answer_loss`` scores it: trimmed, without the end of turn.

    Raises:
        CourseError: the answer is empty.
    """
    ids: list[int] = tokenizer(without_tokens(answer.strip()), add_special_tokens=False)[
        "input_ids"
    ]
    if not ids:
        raise CourseError("the answer to explain is empty: expected some text.")
    return ids


def log_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    answers: Sequence[str],
) -> numpy.ndarray:
    """log p(answer | conversation) of each pair in nats, summed over the answer's tokens; float64, shape (pairs,).

    Raises:
        CourseError: an answer is empty, or a pair is longer than the model's context.
    """
    found: numpy.ndarray = -scores.answer_loss(model, tokenizer, conversations, answers).nats
    if not numpy.isfinite(found).all():
        limit = model.config.max_position_embeddings
        raise CourseError(
            f"an answer is empty, or longer with its prompt than the model's context of {limit:,} tokens: shorten it."
        )
    return found


def leave_one_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str
) -> numpy.ndarray:
    """How much log p(answer) falls when one unit is left out, in nats; float64, shape (units,): above 0, the unit speaks for the answer.

    By hand and in batches: the same numbers as captum's feature ablation.
    """
    everything = range(len(prompt.units))
    turns = [prompt.messages(), *(prompt.messages(set(everything) - {n}) for n in everything)]
    found = log_probabilities(model, tokenizer, turns, [answer] * len(turns))
    falls: numpy.ndarray = found[0] - found[1:]
    return falls


class _Logits(torch.nn.Module):
    """The model as captum calls it, its logits in fp32: in bf16 a log-probability has three digits, and differences have none."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.device = model, model.device

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(**inputs, use_cache=False).logits.float())


def _perturbed(
    method: Callable[[torch.nn.Module], Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str,
    **settings: Any,
) -> numpy.ndarray:
    """Attributions by one of captum's perturbation methods through ``LLMAttribution``; float64, shape (units,).

    Each unit is a value of a template that renders the kept ones into token ids. ``forward_in_tokens=False`` scores the answer in
    one pass. captum 0.9's default goes token by token and, with transformers 5, feeds the whole sequence on top of the cache.
    """
    from captum.attr import LLMAttribution, TextTemplateInput

    def render(*values: str) -> torch.Tensor:
        kept = {n for n, value in enumerate(values) if value}
        return torch.tensor([prompt_ids(tokenizer, prompt.messages(kept))])

    target = torch.tensor(answer_ids(tokenizer, answer), device=model.device)
    _check_room(model, len(prompt_ids(tokenizer, prompt.messages())) + len(target))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # captum about how it prints tokens, which nobody reads here
        found = LLMAttribution(method(_Logits(model)), tokenizer).attribute(
            TextTemplateInput(render, prompt.units),
            target=target,
            forward_in_tokens=False,
            **settings,
        )
    return found.seq_attr.double().cpu().numpy()  # type: ignore[no-any-return]


def _check_room(model: PreTrainedModel, tokens: int) -> None:
    if tokens > (limit := int(model.config.max_position_embeddings)):
        raise CourseError(
            f"question, passages and answer take {tokens:,} tokens, and the model reads {limit:,}: ask a shorter question."
        )


def ablation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str
) -> numpy.ndarray:
    """captum's ``FeatureAblation``: the fall of log p(answer) without one unit, in nats; shape (units,). One pass a unit.

    Raises:
        CourseError: the answer is empty, or prompt and answer are longer than the model's context.
    """
    from captum.attr import FeatureAblation

    return _perturbed(FeatureAblation, model, tokenizer, prompt, answer)


def shapley(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str,
    permutations: int = 10,
    seed: int = 0,
) -> numpy.ndarray:
    """captum's ``ShapleyValueSampling``: the mean change of log p(answer) when a unit joins the others in random order, in nats.

    Shape (units,). The values add up to log p(answer | all units) - log p(answer | none), for any number of ``permutations``
    (Strumbelj and Kononenko, 2010; Castro et al., 2009). ``permutations`` x units passes.
    """
    from captum.attr import ShapleyValueSampling

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _perturbed(
            ShapleyValueSampling, model, tokenizer, prompt, answer, n_samples=permutations
        )


def gradient(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str
) -> numpy.ndarray:
    """captum's ``LayerGradientXActivation`` at the embeddings, summed over each unit's tokens; nats to first order, shape (units,).

    One forward and one backward pass, however long the question is (Shrikumar et al., 2016, arXiv 1605.01713). It is the slope
    along the length of a word's vectors, and a Llama normalises every vector that it reads: expect small values, and an order
    that does badly under ``faithfulness``.

    Raises:
        CourseError: the answer is empty, or prompt and answer are longer than the model's context.
    """
    from captum.attr import LayerGradientXActivation

    ids, owners = prompt.tokens(tokenizer)
    target = torch.tensor([answer_ids(tokenizer, answer)], device=model.device)
    _check_room(model, len(ids) + target.shape[1])

    def log_probability(inputs: torch.Tensor) -> torch.Tensor:
        logits = model(
            input_ids=inputs, use_cache=False, logits_to_keep=target.shape[1] + 1
        ).logits[:, :-1]
        total: torch.Tensor = (
            logits.float().log_softmax(-1).gather(-1, target[..., None]).sum((1, 2))
        )
        return total

    inputs = torch.cat([torch.tensor([ids], device=model.device), target], dim=1)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Input Tensor"
        )  # token ids have no gradients, and need none
        found = LayerGradientXActivation(log_probability, model.get_input_embeddings()).attribute(
            inputs
        )
    tokens = found[0, : len(ids)].float().sum(-1).double().detach().cpu().numpy()
    return numpy.array(
        [
            sum(value for value, owner in zip(tokens, owners, strict=True) if owner == n)
            for n in range(len(prompt.units))
        ]
    )


def contrast(
    method: Callable[..., numpy.ndarray],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str,
    foil: str,
    **settings: Any,
) -> numpy.ndarray:
    """Why ``answer`` and not ``foil``? The attribution of log p(answer) - log p(foil), in nats; shape (units,).

    A word that any answer needs counts for both and falls out (Yin and Neubig, 2022, arXiv 2202.10419). All methods here
    are linear in what they explain, so it is a difference.

    Raises:
        CourseError: answer or foil is empty, or too long for the model's context.
    """
    mine, other = (method(model, tokenizer, prompt, text, **settings) for text in (answer, foil))
    return mine - other  # type: ignore[no-any-return]


METHODS: dict[str, Callable[..., numpy.ndarray]] = {
    "feature ablation": ablation,
    "Shapley sampling": shapley,
    "gradient x activation": gradient,
}


def outranks(prompt: Prompt, values: numpy.ndarray) -> bool:
    """Whether the prompt's ``name`` has the largest value of all words of the question."""
    return int(numpy.argmax(values[: len(prompt.words)])) == prompt.named


def agreement(a: numpy.ndarray, b: numpy.ndarray) -> float:
    """Spearman's rank correlation of two attributions of the same units, -1 to 1; 0 where one of them is constant."""
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    return float(spearmanr(a, b).statistic)


# ---- faithfulness ---------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What faithfulness is measured on: a prompt, the fixed answer, and the attribution under test, shape (words,) or (units,)."""

    prompt: Prompt
    answer: str
    values: numpy.ndarray


ORDERS = ("attribution", "leave-one-out", "random", "reverse")
MEASURES = ("comprehensiveness", "sufficiency")


def faithfulness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    most: int = 3,
    draws: int = 10,
    seed: int = 0,
) -> dict[str, dict[str, numpy.ndarray]]:
    """Does the answer hang on the words that an attribution puts first? measure -> order -> float64, shape (cases,), in nats.

    Comprehensiveness: the fall of log p(answer) when the first k words are deleted; high is good. Sufficiency: its fall when
    only the first k words are left; low is good. Both are means over k = 1 to ``most`` (DeYoung et al., 2020, arXiv 1911.03429,
    who take probabilities). Words are deleted from the text, which is then tokenised again: nothing is zeroed. ``ORDERS`` puts
    the words in the order of the attribution, of leave-one-out, at random (mean of ``draws``), and in the attribution's reverse.
    Passages stay.

    Raises:
        CourseError: no case, or an attribution that does not fit its prompt.
    """
    if not cases:
        raise CourseError("faithfulness needs at least one case: got none.")
    rng = numpy.random.default_rng(seed)
    jobs: list[tuple[int, frozenset[int]]] = []  # (case, kept units) to be scored
    plans = []
    for place, case in enumerate(cases):
        count, units = len(case.prompt.words), frozenset(range(len(case.prompt.units)))
        if len(case.values) not in (count, len(units)):
            raise CourseError(
                f"case {place}: {len(case.values)} values for {count} words. Explain this very prompt first."
            )
        alone = leave_one_out(model, tokenizer, case.prompt, case.answer)
        plans.append(_orders(case.values[:count], alone[:count], rng, draws))
        jobs.append((place, units))
        for order in (order for several in plans[-1].values() for order in several):
            for first in _firsts(order, most):
                jobs += [(place, units - first), (place, units - (frozenset(order) - first))]
    jobs = list(dict.fromkeys(jobs))
    turns = [cases[place].prompt.messages(kept) for place, kept in jobs]
    known = dict(
        zip(
            jobs,
            log_probabilities(model, tokenizer, turns, [cases[place].answer for place, _ in jobs]),
            strict=True,
        )
    )

    def fall(measure: str, place: int, order: Sequence[int]) -> float:
        units = frozenset(range(len(cases[place].prompt.units)))
        gone = [
            first if measure == "comprehensiveness" else frozenset(order) - first
            for first in _firsts(order, most)
        ]
        return float(
            numpy.mean([known[place, units] - known[place, units - some] for some in gone])
        )

    return {
        measure: {
            name: numpy.array(
                [
                    numpy.mean([fall(measure, place, order) for order in plan[name]])
                    for place, plan in enumerate(plans)
                ]
            )
            for name in ORDERS
        }
        for measure in MEASURES
    }


def _orders(
    values: numpy.ndarray, alone: numpy.ndarray, rng: numpy.random.Generator, draws: int
) -> dict[str, list[list[int]]]:
    first = numpy.argsort(-values, kind="stable").tolist()
    return {
        "attribution": [first],
        "leave-one-out": [numpy.argsort(-alone, kind="stable").tolist()],
        "random": [rng.permutation(len(values)).tolist() for _ in range(draws)],
        "reverse": [first[::-1]],
    }


def _firsts(order: Sequence[int], most: int) -> list[frozenset[int]]:
    return [frozenset(order[:k]) for k in range(1, min(most, len(order)) + 1)]


def faithfulness_intervals(
    found: Mapping[str, Mapping[str, numpy.ndarray]], seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Means of ``faithfulness`` with 95 % intervals, and the paired differences "attribution - random" and so on.

    A faithful attribution has ``["comprehensiveness"]["attribution - random"]`` above 0 and the same of sufficiency below 0.
    """
    return {
        measure: {name: scores.interval(values, seed) for name, values in orders.items()}
        | {
            f"attribution - {name}": scores.paired_interval(
                orders[name], orders["attribution"], seed
            )
            for name in ORDERS[1:]
        }
        for measure, orders in found.items()
    }


class Swap(NamedTuple):
    """What another disease in the same question does; the attributions are of the *first* answer."""

    answer: str
    swapped_answer: str
    fall: (
        float  # nats: log p(first answer | first question) - log p(first answer | swapped question)
    )
    words: list[str]
    values: numpy.ndarray  # shape (words,)
    swapped_words: list[str]
    swapped_values: numpy.ndarray
    named: float  # what the name gets, before
    swapped_named: float  # and after


def swap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    name: str,
    other: str,
    max_new_tokens: int = 64,
    method: Callable[..., numpy.ndarray] = leave_one_out,
) -> Swap:
    """Ask ``question`` about ``name``, then about ``other``; and explain the first answer under both.

    Raises:
        CourseError: the question does not hold ``name``, or the first answer is empty.
    """
    first = Prompt(question, name=name)
    place = first.text.lower().index(name.lower())
    second = Prompt(first.text[:place] + other + first.text[place + len(name) :], name=other)
    answer, swapped = (
        a.text for a in ask(model, tokenizer, [first.text, second.text], max_new_tokens)
    )
    before, after = log_probabilities(
        model, tokenizer, [first.messages(), second.messages()], [answer] * 2
    )
    values, others = (method(model, tokenizer, prompt, answer) for prompt in (first, second))
    named, swapped_named = float(values[first.named]), float(others[second.named])
    return Swap(
        answer,
        swapped,
        float(before - after),
        first.words,
        values,
        second.words,
        others,
        named,
        swapped_named,
    )


# ---- attention ------------------------------------------------------------------------------------------------------


def attention_map(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    layer: int,
    head: int,
) -> tuple[list[str], numpy.ndarray]:
    """(tokens, weights) of one attention head over a prompt; fp32, shape (tokens, tokens), each row sums to 1, none looks ahead.

    A picture, no evidence: a head's weights say where it read, not what the answer hangs on (Jain and Wallace, 2019, arXiv
    1902.10186). Load the model with ``attention="eager"`` in the plan; SDPA never holds these weights.

    Raises:
        CourseError: the model was loaded with another attention, or has no such layer or head.
    """
    config = model.config
    if config._attn_implementation != "eager":
        raise CourseError(
            "attention weights exist with eager attention only: load with dataclasses.replace(plan, attention='eager')."
        )
    if not (0 <= layer < config.num_hidden_layers and 0 <= head < config.num_attention_heads):
        have = f"{config.num_hidden_layers} layers of {config.num_attention_heads} heads, counted from 0"
        raise CourseError(f"no head {head} in layer {layer}: the model has {have}.")
    ids = prompt_ids(tokenizer, messages)
    _check_room(model, len(ids))
    with torch.inference_mode():
        weights = model(
            input_ids=torch.tensor([ids], device=model.device),
            output_attentions=True,
            use_cache=False,
        ).attentions
    return [tokenizer.decode([i]) for i in ids], weights[layer][0, head].float().cpu().numpy()


# ---- one page -------------------------------------------------------------------------------------------------------

NAMED_STYLE = """
ol.words { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .35rem }
ol.words li { padding: .3rem .55rem; border: 1px solid #8a8a8a; border-radius: .3rem; text-align: center }
ol.words small { display: block; font-variant-numeric: tabular-nums }
blockquote { margin: .5rem 0; padding: .2rem .9rem; border-left: 4px solid #0072b2; white-space: pre-wrap; overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class Explanation:
    """All that the page shows; ``values`` has one number a word of the prompt, ``pulls`` one a passage of ``hits``, in nats."""

    prompt: Prompt
    answer: Answer
    hits: list[Hit]
    supports: list[Support]
    values: numpy.ndarray
    pulls: numpy.ndarray
    embedded: bool

    def __str__(self) -> str:
        """What a terminal shows: the answer with its notice, the sources, and the words by their weight."""
        flag = red_flag(self.prompt.text)
        order = numpy.argsort(-numpy.abs(self.values), kind="stable")
        heavy = ", ".join(f"{self.prompt.words[n]} {self.values[n]:+.2f}" for n in order[:5])
        sources = [f"[{number}] {hit}" for number, hit in enumerate(self.hits, start=1)] or [
            f"{NO_SOURCE}."
        ]
        notices = [NOTICE, *([EMBEDDED] if self.embedded else [])]
        return "\n".join(
            [
                *([flag.message] if flag else []),
                self.answer.text,
                "",
                *notices,
                "",
                *sources,
                f"hangs on (nats): {heavy}",
            ]
        )


def check_question(
    question: str, tokenizer: PreTrainedTokenizerBase, context: int, max_new_tokens: int
) -> str:
    """``question`` without control characters, if it can be asked.

    Raises:
        CourseError: it is empty, or with its answer longer than the ``context`` (tokens).
    """
    text = CONTROL.sub("", question).strip()
    if not tidy_question(text):
        raise CourseError(
            'the question is empty: ask one in quotes, for example medquad explain "What causes asthma?"'
        )
    needed = len(prompt_ids(tokenizer, prompt_messages(text))) + max_new_tokens
    if needed > context:
        raise CourseError(
            f"the question is too long: with its answer {needed:,} tokens, and the model reads {context:,}. Ask a shorter one."
        )
    return text


def explain(plan: Plan, question: str) -> Explanation:
    """Answer ``question`` with the tuned model of the plan, find sources for the answer, and explain it by leaving words out.

    Raises:
        CourseError: an empty question, one that is too long, or no adapter.
    """
    from transformers import AutoConfig

    tokenizer = load_tokenizer(plan)
    context = int(
        AutoConfig.from_pretrained(
            plan.model_source, revision=plan.hub_revision
        ).max_position_embeddings
    )
    text = check_question(question, tokenizer, context, plan.max_new_tokens)
    model = load_tuned(plan)
    index = whole_archive(plan, plan.folder / "adapter")
    prompt = Prompt(text)
    answer = ask(model, tokenizer, [text], plan.max_new_tokens)[0]
    hits, supported = cite(index, text, answer.text)
    values = (
        leave_one_out(model, tokenizer, prompt, answer.text)
        if answer.text
        else numpy.zeros(len(prompt.words))
    )
    pulls = _pulls(model, tokenizer, text, hits, answer.text)
    return Explanation(prompt, answer, hits, supported, values, pulls, plan.model_id == "embedded")


def _pulls(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    hits: Sequence[Hit],
    answer: str,
) -> numpy.ndarray:
    """What each passage does to log p(answer) when all of them stand in the prompt; empty where they do not fit, or none is close."""
    prompt = Prompt(question, [f"{hit.title}: {hit.row['answer']}" for hit in hits])
    if not hits or not answer:
        return numpy.zeros(0)
    try:
        return leave_one_out(model, tokenizer, prompt, answer)[len(prompt.words) :]
    except CourseError:  # longer than the context: the page does without this column
        return numpy.zeros(0)


def write_page(found: Explanation, path: Path) -> Path:
    """Write ``found`` to ``path`` as one HTML page without scripts or links to load; every text in it is escaped.

    Raises:
        CourseError: the file cannot be written.
    """
    title = f"Explained: {found.prompt.text[:80]}"
    with whole_file(path) as temporary:
        temporary.write_text(document(title, _parts(found), NAMED_STYLE), encoding="utf-8")
    return path


def _parts(found: Explanation) -> list[str]:
    flag = red_flag(found.prompt.text)
    notices = [*([flag.message] if flag else []), NOTICE, *([EMBEDDED] if found.embedded else [])]
    return [
        f"<h1>{html.escape(found.prompt.text)}</h1>",
        *(f'<p class="notice">{html.escape(text)}</p>' for text in notices),
        "<h2>Answer</h2>",
        f"<blockquote>{html.escape(found.answer.text or '(the model said nothing)')}</blockquote>",
        "<h2>Passages found for this question</h2>",
        "<p>They were looked up after the answer, which was given without them.</p>",
        _passages(found),
        "<h2>Support for each sentence</h2>",
        f"<p>Score: the share of a sentence's words, rare ones counting more, that one sentence of the passage holds. It compares words, "
        f"not meaning. Under {SUPPORT:.2f}: no close source.</p>",
        html_table(
            ["sentence", "score", "best passage", "its sentence"],
            [
                [
                    s.sentence,
                    f"{s.score:.2f}",
                    s.hit.title if s.hit else "no close source",
                    s.evidence or "–",
                ]
                for s in found.supports
            ],
        ),
        "<h2>What the answer hangs on</h2>",
        "<p>How much less likely this very answer gets when one word of the question is deleted, in nats (feature ablation). "
        "Blue and plus: the word speaks for the answer; orange and minus: against it; the darker, the more.</p>",
        word_map(found.prompt.words, found.values),
    ]


def _passages(found: Explanation) -> str:
    if not found.hits:
        return f"<p>{html.escape(NO_SOURCE)}.</p>"
    pulls = [f"{value:+.2f}" for value in found.pulls] or ["–"] * len(found.hits)
    items = "".join(
        f"<li>{html.escape(f'{hit}; pull {pull}')}"
        f"<details><summary>its text</summary><p>{html.escape(hit.row['answer'])}</p></details></li>"
        for hit, pull in zip(found.hits, pulls, strict=True)
    )
    about = "<p>Pull: how much less likely the answer gets, in nats, without this passage in a prompt that holds them all.</p>"
    return f"{about}<ol>{items}</ol>"


def word_map(units: Sequence[str], values: Sequence[float] | numpy.ndarray) -> str:
    """Words as an HTML list, shaded by their values (see ``plots.shade``), each with its number; the text is escaped."""
    most = max((abs(float(value)) for value in values), default=0.0)
    items = "".join(
        f'<li style="background:{shade(float(value), most)}">{html.escape(unit)}<small>{float(value):+.2f}</small></li>'
        for unit, value in zip(units, values, strict=True)
    )
    return f'<ol class="words">{items}</ol>'
