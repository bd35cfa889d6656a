"""Explain one answer: which words of the question, and which passages, raise its log-probability.

An attribution describes the model, not medicine. Every method scores one fixed answer by teacher
forcing, in nats (natural logarithm), summed over its tokens without the end of turn.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from medquad_utils import CourseError, chat, scores
from medquad_utils.evaluation import PASSAGE_WORDS, check_question, whole_archive
from medquad_utils.files import whole_file
from medquad_utils.generation import Answer, ask, load_tokenizer, load_tuned
from medquad_utils.plots import shade
from medquad_utils.profiles import Plan
from medquad_utils.report import EMBEDDED
from medquad_utils.retrieval import NO_SOURCE, SUPPORT, Hit, Support, cite
from medquad_utils.safety import red_flag
from medquad_utils.scores import Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer

# An attribution: (model, tokenizer, prompt, answer) -> float64, shape (units,), in nats.
Values = numpy.ndarray
# A word, or the punctuation behind it.
UNIT = re.compile(r"[^\s?!.,;:]+(?:[.,:][^\s?!.,;:]+)*|[?!.,;:]+")
MARK = "\u241f"  # stands for a turn's text in a rendered chat template; no text of ours holds it


@dataclass
class Prompt:
    """A question and its passages, cut into the units of an attribution: words, then passages.

    Punctuation is a unit of its own. ``name``, a disease in the question, is one unit, because half
    a name still tells the model which disease is meant. Passages are cut to ``PASSAGE_WORDS``.
    """

    question: str
    passages: Sequence[str] = ()
    name: str = ""

    def __post_init__(self) -> None:
        self.text = chat.without_tokens(chat.tidy_question(self.question))  # as the model reads it
        short = (" ".join(passage.split()[:PASSAGE_WORDS]) for passage in self.passages)
        self.passages = tuple(map(chat.without_tokens, short))
        if not self.text:
            raise CourseError('the question is empty: write a text such as "What causes asthma?".')
        if self.name.lower() not in self.text.lower():
            raise CourseError(
                f"the question {self.text[:80]!r} does not hold {self.name!r}: "
                "give a name as the question writes it."
            )
        self.spans = _spans(self.text, self.name)
        self.words = [self.text[start:end] for start, end in self.spans]
        numbers = range(1, len(self.passages) + 1)
        self.units = [*self.words, *(f"[{number}]" for number in numbers)]

    @property
    def named(self) -> int:
        """The number of the unit that holds the first word of ``name``."""
        start = self.text.lower().index(self.name.lower())
        return next(n for n, span in enumerate(self.spans) if span[0] <= start < span[1])

    def messages(self, kept: Collection[int] | None = None) -> list[dict[str, str]]:
        """Return the turns before the answer with the ``kept`` units only (numbers; default: all).

        Other units are deleted with the space before them, and passages are numbered again.
        """
        if kept is None:
            return chat.grounded_messages(self.text, self.passages)
        spans = [span for n, span in enumerate(self.spans) if n in kept]
        question = "".join(self.text[max(0, a - (self.text[a - 1] == " ")) : b] for a, b in spans)
        numbered = enumerate(self.passages, start=len(self.spans))
        return chat.grounded_messages(question, [text for n, text in numbered if n in kept])

    def tokens(self, tokenizer: Tokenizer) -> tuple[list[int], list[int | None]]:
        """Return the prompt's token ids and each token's unit, None for template and numbering.

        A token over two units ("?)") belongs to the one with more of its characters, the first of
        equals. Raises CourseError if the chat template changes the text of a turn.
        """
        messages = self.messages()
        content = messages[-1]["content"]
        turns = [*messages[:-1], {"role": "user", "content": MARK}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        head, _, tail = text.partition(MARK)
        encoded = tokenizer(
            head + content + tail, add_special_tokens=False, return_offsets_mapping=True
        )
        ids = list(encoded["input_ids"])
        if ids != chat.prompt_ids(tokenizer, messages):
            raise CourseError(
                "the tokenizer's chat template changes the text of a turn, so words have no place "
                "in it: use a template that keeps the text, such as chat.CHAT_TEMPLATE."
            )
        start = len(content) - len(self.text)  # the passages come before, a line each
        places = [(start + a, start + b) for a, b in self.spans]
        places += [m.span(1) for m in re.finditer(r"^\[\d+\] (.*)$", content[:start], re.MULTILINE)]
        places = [(a + len(head), b + len(head)) for a, b in places]
        return ids, [_owner(a, b, places) for a, b in encoded["offset_mapping"]]


def _spans(text: str, name: str) -> list[tuple[int, int]]:
    """(start, end) of each unit of ``text``; the words of ``name`` are one."""
    spans = [match.span() for match in UNIT.finditer(text)]
    if not name:
        return spans
    start = text.lower().index(name.lower())
    inside = [(a, b) for a, b in spans if a < start + len(name) and b > start]
    return sorted({*spans} - {*inside} | {(inside[0][0], inside[-1][1])})


def _owner(start: int, end: int, places: Sequence[tuple[int, int]]) -> int | None:
    shared = [min(end, stop) - max(start, begin) for begin, stop in places]
    most = max(shared, default=0)
    return shared.index(most) if most > 0 else None


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


def leave_one_out(model: Model, tokenizer: Tokenizer, prompt: Prompt, answer: str) -> Values:
    """Return the fall of log p(answer) without each unit; above 0, the unit supports the answer.

    Equals captum's feature ablation, but runs in batches.
    """
    units = range(len(prompt.units))
    turns = [prompt.messages(), *(prompt.messages(set(units) - {n}) for n in units)]
    values = log_probabilities(model, tokenizer, turns, [answer] * len(turns))
    falls: Values = values[0] - values[1:]
    return falls


class _Logits(torch.nn.Module):
    """The model as captum calls it. In bf16 a difference of log-probabilities would be noise."""

    def __init__(self, model: Model):
        super().__init__()
        self.model, self.device = model, model.device

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(**inputs, use_cache=False).logits.float())


def _perturbed(
    method: Callable[[torch.nn.Module], Any], model: Model, tokenizer: Tokenizer, prompt: Prompt,
    answer: str, **settings: Any,
) -> Values:  # fmt: skip
    """Run one of captum's perturbation methods on the prompt's units."""
    from captum.attr import LLMAttribution, TextTemplateInput

    def render(*values: str) -> torch.Tensor:  # captum empties the values of left-out units
        kept = {n for n, value in enumerate(values) if value}
        return torch.tensor([chat.prompt_ids(tokenizer, prompt.messages(kept))])

    target = torch.tensor(answer_ids(tokenizer, answer), device=model.device)
    _check_length(model, len(chat.prompt_ids(tokenizer, prompt.messages())) + len(target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how captum prints tokens
        # captum 0.9 scores token by token by default and, with transformers 5, feeds the whole
        # sequence on top of the cache: wrong numbers. False scores the answer in one pass.
        result = LLMAttribution(method(_Logits(model)), tokenizer).attribute(
            TextTemplateInput(render, prompt.units), target=target,
            forward_in_tokens=False, **settings,
        )  # fmt: skip
    return result.seq_attr.double().cpu().numpy()  # type: ignore[no-any-return]


def _check_length(model: Model, tokens: int) -> None:
    if tokens > (limit := int(model.config.max_position_embeddings)):
        raise CourseError(
            f"question, passages and answer take {tokens:,} tokens, and the model reads {limit:,}: "
            "ask a shorter question."
        )


def ablation(model: Model, tokenizer: Tokenizer, prompt: Prompt, answer: str) -> Values:
    """Return captum's ``FeatureAblation``: the fall of log p(answer) without each unit."""
    from captum.attr import FeatureAblation

    return _perturbed(FeatureAblation, model, tokenizer, prompt, answer)


def shapley(
    model: Model, tokenizer: Tokenizer, prompt: Prompt, answer: str, permutations: int = 10,
    seed: int = 0,
) -> Values:  # fmt: skip
    """Return captum's ``ShapleyValueSampling``: a unit's mean effect when it joins in random order.

    The values add up to log p(answer | all units) - log p(answer | none), for any number of
    ``permutations`` (Strumbelj and Kononenko, 2010; Castro et al., 2009).
    """
    from captum.attr import ShapleyValueSampling as Sampling

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _perturbed(Sampling, model, tokenizer, prompt, answer, n_samples=permutations)


def gradient(model: Model, tokenizer: Tokenizer, prompt: Prompt, answer: str) -> Values:
    """Return captum's ``LayerGradientXActivation`` at the embeddings, summed over a unit's tokens.

    One forward and one backward pass (Shrikumar et al., 2016, arXiv 1605.01713). It is the slope
    along the length of a word's vectors, and Llama normalises every vector that it reads. So the
    values are small, and their order does badly under ``faithfulness``.
    """
    from captum.attr import LayerGradientXActivation

    ids, owners = prompt.tokens(tokenizer)
    target = torch.tensor([answer_ids(tokenizer, answer)], device=model.device)
    _check_length(model, len(ids) + target.shape[1])

    def log_probability(inputs: torch.Tensor) -> torch.Tensor:
        keep = target.shape[1] + 1  # the row before a token predicts it
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        rows = logits.float().log_softmax(-1)
        total: torch.Tensor = rows.gather(-1, target[..., None]).sum((1, 2))
        return total

    inputs = torch.cat([torch.tensor([ids], device=model.device), target], dim=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input Tensor")  # token ids need no gradient
        method = LayerGradientXActivation(log_probability, model.get_input_embeddings())
        result = method.attribute(inputs)
    tokens = result[0, : len(ids)].float().sum(-1).double().detach().cpu().numpy()
    values = numpy.zeros(len(prompt.units))
    for value, owner in zip(tokens, owners, strict=True):
        if owner is not None:
            values[owner] += value
    return values


METHODS: dict[str, Callable[..., Values]] = {
    "feature ablation": ablation,
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
    if not cases:
        raise CourseError("faithfulness needs at least one case: got none.")
    rng = numpy.random.default_rng(seed)
    results = []
    for case in cases:
        orders = _orders(model, tokenizer, case, rng, draws)
        results.append(_falls(model, tokenizer, case, orders, most))
    return {m: {o: numpy.array([r[m, o] for r in results]) for o in ORDERS} for m in MEASURES}


def _orders(
    model: Model, tokenizer: Tokenizer, case: Case, rng: numpy.random.Generator, draws: int
) -> dict[str, list[list[int]]]:
    """The rankings of a case's words that are compared, by name."""
    count = len(case.prompt.words)
    if len(case.values) not in (count, len(case.prompt.units)):
        raise CourseError(
            f"{len(case.values)} values for {count} words of {case.prompt.text[:80]!r}: "
            "explain this very prompt first."
        )
    alone = leave_one_out(model, tokenizer, case.prompt, case.answer)
    ranked = numpy.argsort(-case.values[:count], kind="stable").tolist()
    return {
        "attribution": [ranked],
        "leave-one-out": [numpy.argsort(-alone[:count], kind="stable").tolist()],
        "random": [rng.permutation(count).tolist() for _ in range(draws)],
        "reverse": [ranked[::-1]],
    }


def _falls(
    model: Model, tokenizer: Tokenizer, case: Case, orders: Mapping[str, list[list[int]]], most: int
) -> dict[tuple[str, str], float]:
    """(measure, order) -> mean fall of log p(answer) over k and the order's rankings."""
    units, count = frozenset(range(len(case.prompt.units))), len(case.prompt.words)
    words = frozenset(range(count))
    kept: dict[tuple[str, str], list[frozenset[int]]] = {}
    for name, rankings in orders.items():
        first = [frozenset(r[: k + 1]) for r in rankings for k in range(min(most, count))]
        kept["comprehensiveness", name] = [units - some for some in first]
        kept["sufficiency", name] = [units - (words - some) for some in first]
    # The orders share many subsets: each is scored once.
    subsets = list(dict.fromkeys([units, *(s for several in kept.values() for s in several)]))
    turns = [case.prompt.messages(subset) for subset in subsets]
    values = log_probabilities(model, tokenizer, turns, [case.answer] * len(turns))
    log_p = dict(zip(subsets, values, strict=True))
    return {key: float(log_p[units] - numpy.mean([log_p[s] for s in v])) for key, v in kept.items()}


def faithfulness_intervals(
    results: Mapping[str, Mapping[str, Values]], seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Return the means of ``faithfulness`` with 95 % intervals, and paired differences.

    A faithful attribution has "attribution - random" above 0 in comprehensiveness and below 0 in
    sufficiency.
    """
    table: dict[str, dict[str, Interval]] = {}
    for measure, orders in results.items():
        table[measure] = {name: scores.interval(values, seed) for name, values in orders.items()}
        for name in ORDERS[1:]:
            pair = orders[name], orders["attribution"]
            table[measure][f"attribution - {name}"] = scores.paired_interval(*pair, seed)
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
    config = model.config
    if config._attn_implementation != "eager":  # SDPA never holds these weights
        raise CourseError(
            f"attention {config._attn_implementation!r} keeps no weights: "
            'call model.set_attn_implementation("eager") first.'
        )
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if not (0 <= layer < layers and 0 <= head < heads):
        raise CourseError(
            f"no head {head} in layer {layer}: "
            f"the model has {layers} layers of {heads} heads, counted from 0."
        )
    ids = chat.prompt_ids(tokenizer, messages)
    _check_length(model, len(ids))
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        output = model(input_ids=inputs, output_attentions=True, use_cache=False)
    weights = output.attentions[layer][0, head].float().cpu().numpy()
    return [tokenizer.decode([i]) for i in ids], weights


@dataclass(frozen=True)
class Explanation:
    """The content of the page, in nats: ``values`` one a word, ``pulls`` one a passage of ``hits``.

    A pull is the fall of log p(answer) without that passage, in a prompt with all of them.
    """

    prompt: Prompt
    answer: Answer
    hits: list[Hit]
    supports: list[Support]
    values: Values
    pulls: Values
    embedded: bool

    @property
    def notices(self) -> list[str]:
        """What has to be read with the answer; an emergency comes first."""
        flag = red_flag(self.prompt.text)
        notices = (flag and flag.message, chat.NOTICE, self.embedded and EMBEDDED)
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
    from transformers import AutoConfig

    tokenizer = load_tokenizer(plan)
    config = AutoConfig.from_pretrained(plan.model_source, revision=plan.hub_revision)
    context = int(config.max_position_embeddings)
    prompt = Prompt(check_question(question, tokenizer, context, plan.max_new_tokens))
    model = load_tuned(plan)
    index = whole_archive(plan, plan.folder / "adapter")
    answer = ask(model, tokenizer, [prompt.question], plan.max_new_tokens)[0]
    hits, supported = cite(index, prompt.question, answer.text)
    values, pulls = numpy.zeros(len(prompt.words)), numpy.zeros(0)
    if answer.text:
        values = leave_one_out(model, tokenizer, prompt, answer.text)
    if answer.text and hits:
        texts = [f"{hit.title}: {hit.row['answer']}" for hit in hits]
        with suppress(CourseError):  # too long for the context: the page shows no pulls
            full = Prompt(prompt.question, texts)
            pulls = leave_one_out(model, tokenizer, full, answer.text)[len(full.words) :]
    embedded = plan.model_id == "embedded"
    return Explanation(prompt, answer, hits, supported, values, pulls, embedded)


def write_page(explanation: Explanation, path: Path) -> Path:
    """Write one HTML page without scripts or links to load; every text in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    assets = FileSystemLoader(Path(__file__).parent / "assets")
    environment = Environment(loader=assets, autoescape=True, undefined=StrictUndefined)
    largest = max(map(abs, explanation.values.tolist()), default=0.0)
    pairs = zip(explanation.prompt.words, explanation.values.tolist(), strict=True)
    page = environment.get_template("page.html.jinja").render(
        title=f"Explained: {explanation.prompt.text[:80]}",
        e=explanation,
        pulls=[f"{pull:+.2f}" for pull in explanation.pulls] or ["–"] * len(explanation.hits),
        words=[(word, f"{value:+.2f}", shade(value, largest)) for word, value in pairs],
        no_source=NO_SOURCE,
        threshold=f"{SUPPORT:.2f}",
    )
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
