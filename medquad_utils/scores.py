"""Score answers: likeness to references, likelihood under a model, confidence intervals.

Functions that compare take ``answers``, one text a row, and ``references``, one text or several a
row, of which the best counts. They return float64, shape (rows,). An empty answer, ``None`` and NaN
score 0. A row without a reference raises a ``CourseError``.
"""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy

from medquad_utils import CourseError
from medquad_utils.assets.sample import SOURCE, article, conditions, facts_of
from medquad_utils.chat import end_ids, prompt_ids, without_tokens
from medquad_utils.files import ASSETS, Row
from medquad_utils.profiles import Plan
from medquad_utils.splits import normalise

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer

References = Sequence[str] | Sequence[Sequence[str]]
Values = numpy.ndarray | Sequence[float]
Groups = Sequence[Hashable] | numpy.ndarray | None  # of the rows; None: each row for itself
Interval = tuple[float, float, float]  # the value, and both ends of its 95 % interval

BATCH_TOKENS = 8192  # in one forward pass, padding included
RESAMPLES = 2000  # of a bootstrap interval
Z = NormalDist().inv_cdf(0.975)  # 1.96


class Score(NamedTuple):
    """The meaning of a number: name in tables, unit, better direction, what it measures."""

    name: str
    unit: str
    better: str  # "up", "down" or "near 1"
    what: str


SCORES = {
    "rouge1": Score("ROUGE-1", "0 to 1", "up",
                    "words shared with the reference, in any order; stemmed, F1"),
    "rouge2": Score("ROUGE-2", "0 to 1", "up", "pairs of neighbouring words shared; stemmed, F1"),
    "rougeL": Score("ROUGE-L", "0 to 1", "up",
                    "longest common sequence of words, with gaps; stemmed, F1"),
    "bleu": Score("BLEU", "0 to 1", "up", "shared runs of one to four words; short answers lose"),
    "chrf": Score("chrF", "0 to 1", "up", "shared runs of one to six characters"),
    "tfidf_cosine": Score("TF-IDF cosine", "0 to 1", "up", "shared words, rare ones count more"),
    "facts_complete": Score("all facts", "share", "up", "answers with every fact (sample only)"),
    "length_ratio": Score("length", "x reference", "near 1", "words for each reference word"),
    "repetition": Score("repetition", "0 to 1", "down", "runs of four words said before"),
    "stop_rate": Score("stopped", "share", "up", "answers that end before the length limit"),
    "bits_per_byte": Score("bits per byte", "bits", "down", "cost of predicting the reference"),
    "perplexity": Score("perplexity", "tokens", "down", "equally likely tokens at each step"),
}  # fmt: skip


def _rows(answers: Sequence[str], references: References) -> list[tuple[str, list[str]]]:
    """Pair each answer with the list of its references."""
    rows = []
    for number, (answer, given) in enumerate(zip(answers, references, strict=True), start=1):
        several = given if isinstance(given, list | tuple | numpy.ndarray) else [given]
        texts = [text for text in several if isinstance(text, str)]
        if not texts:
            raise CourseError(f"row {number} has no reference answer: leave it out of the scoring.")
        # None and NaN stand in the empty cells of a table.
        rows.append((answer if isinstance(answer, str) else "", texts))
    return rows


def _best(
    answers: Sequence[str], references: References, score: Callable[[str, str], float]
) -> numpy.ndarray:
    rows = _rows(answers, references)
    return numpy.array([max(score(a, text) for text in texts) for a, texts in rows], dtype=float)


# ---- likeness ------------------------------------------------------------------------------------
def rouge(
    answers: Sequence[str], references: References, stem: bool = True,
    kinds: Sequence[str] = ("rouge1", "rouge2", "rougeL"),
) -> dict[str, numpy.ndarray]:  # fmt: skip
    """Compute ROUGE F1 by kind (Lin, 2004; Google's ``rouge_score``).

    Words are compared by their Porter stem; ``stem=False`` is the default of the package
    ``evaluate``. Only a-z and 0-9 make words: text in another script scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(kinds, use_stemmer=stem)  # its score_multi takes the best reference
    rows = [scorer.score_multi(texts, answer) for answer, texts in _rows(answers, references)]
    return {kind: numpy.array([row[kind].fmeasure for row in rows], dtype=float) for kind in kinds}


def rouge_l(answers: Sequence[str], references: References, stem: bool = True) -> numpy.ndarray:
    """Compute ROUGE-L F1 alone (see ``rouge``)."""
    return rouge(answers, references, stem, ["rougeL"])["rougeL"]


def bleu(answers: Sequence[str], references: References) -> numpy.ndarray:
    """Compute sentence BLEU, 0 to 1 (Papineni et al., 2002; sacrebleu, effective order)."""
    from sacrebleu.metrics import BLEU

    score = BLEU(effective_order=True).sentence_score
    # sacrebleu's best value is 100.00000000000004
    return _best(answers, references, lambda a, r: min(1.0, score(a, [r]).score / 100))


def chrf(answers: Sequence[str], references: References) -> numpy.ndarray:
    """Compute sentence chrF2, 0 to 1 (Popović, 2015; sacrebleu); it works in every script."""
    from sacrebleu.metrics import CHRF

    score = CHRF().sentence_score
    return _best(answers, references, lambda a, r: score(a, [r]).score / 100)


def tfidf_cosine(
    answers: Sequence[str], references: References, corpus: Sequence[str]
) -> numpy.ndarray:
    """Compute the cosine of TF-IDF vectors, 0 to 1 (Salton and Buckley, 1988; scikit-learn).

    ``corpus`` gives the document frequencies. Words that it lacks are ignored.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = {"analyzer": lambda text: normalise(text).split()}  # of every script
    vector = TfidfVectorizer(**words).fit(corpus).transform  # of length 1
    cosines = _best(answers, references, lambda a, r: (vector([a]) @ vector([r]).T).sum())
    return cosines.clip(0, 1)


def length_ratio(answers: Sequence[str], references: References) -> numpy.ndarray:
    """Divide the words of an answer by those of the reference nearest in length."""
    ratios = []
    for answer, texts in _rows(answers, references):
        words = len(answer.split())
        nearest = min((len(text.split()) for text in texts), key=lambda n: (abs(n - words), n))
        ratios.append(words / max(1, nearest))
    return numpy.array(ratios, dtype=float)


def repetition(answers: Sequence[str]) -> numpy.ndarray:
    """Compute the share of repeated 4-grams, case and punctuation aside (Welleck et al., 2020)."""
    words = [normalise(answer).split() for answer in answers]
    runs = [list(zip(w, w[1:], w[2:], w[3:], strict=False)) for w in words]
    return numpy.array([1 - len(set(r)) / len(r) if r else 0.0 for r in runs], dtype=float)


def facts_column(answers: Sequence[str], rows: Sequence[Row]) -> numpy.ndarray:
    """Mark answers with every fact of their row, word for word, 1, others 0; NaN: none listed."""
    marks = []
    for answer, row in zip(answers, rows, strict=True):
        ours = (row["source"] or "").startswith(SOURCE)
        facts = facts_of(row["focus"] or "", row["qtype"]) if ours else []
        text = f" {normalise(answer)} "
        complete = all(f" {normalise(fact)} " in text for fact in facts)
        marks.append(float(complete) if facts else math.nan)
    return numpy.array(marks, dtype=float)


# ---- likelihood ----------------------------------------------------------------------------------
class Losses(NamedTuple):
    """Likelihood of texts under a model; float64, shape (rows,). NaN: the text was not scored."""

    nats: numpy.ndarray  # negative log-likelihood, summed over the text's tokens
    tokens: numpy.ndarray
    bytes: numpy.ndarray  # of the text in UTF-8


def answer_loss(
    model: Model, tokenizer: Tokenizer, conversations: Sequence[Sequence[Mapping[str, str]]],
    references: Sequence[str], progress: str = "",
) -> Losses:  # fmt: skip
    """Score each reference after its conversation (lists of messages), by teacher forcing.

    Prompt and end of turn do not count. NaN: it is empty or longer than the model's context.
    """
    prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    texts = [without_tokens(reference.strip()) for reference in references]
    return _losses(model, tokenizer, prompts, texts, progress)


def text_loss(
    model: Model, tokenizer: Tokenizer, texts: Sequence[str], progress: str = ""
) -> Losses:
    """Score plain ``texts`` from their first token on, after a begin-of-text token."""
    # A tokenizer without a begin-of-text token (Qwen's) starts a text after an end token.
    begin = next(i for i in (tokenizer.bos_token_id, *end_ids(tokenizer)) if i is not None)
    texts = [without_tokens(text) for text in texts]
    return _losses(model, tokenizer, [[begin]] * len(texts), texts, progress)


def _losses(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[list[int]], texts: Sequence[str],
    progress: str,
) -> Losses:  # fmt: skip
    """Score each text after its prompt, in batches of rows of similar length."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence
    from tqdm.auto import tqdm

    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    lengths = [len(prompt) + len(scored) for prompt, scored in zip(prompts, ids, strict=True)]
    limit, head = model.config.max_position_embeddings, model.get_output_embeddings()
    order = [n for n, length in enumerate(lengths) if ids[n] and length <= limit]
    order.sort(key=lengths.__getitem__, reverse=True)
    losses = Losses(*numpy.full((3, len(texts)), numpy.nan))
    with torch.inference_mode(), tqdm(total=len(order), desc=progress, disable=not progress) as bar:
        while order:
            # The longest row comes first and sets the width of its batch.
            size = max(1, BATCH_TOKENS // lengths[order[0]])
            batch, order = order[:size], order[size:]
            rows = [torch.tensor(prompts[n] + ids[n]) for n in batch]
            # Padding stands on the right, where no token of a causal model sees it: no mask.
            inputs = pad_sequence(rows, batch_first=True).to(model.device)
            hidden = model.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state
            for n, tokens, states in zip(batch, inputs, hidden, strict=True):
                first, end = len(prompts[n]), lengths[n]
                # The shift: the state at a position predicts the next token. 512 positions at a
                # time: all logits in fp32 would be the largest thing in memory.
                chunks = states[first - 1 : end - 1].split(512), tokens[first:end].split(512)
                nats = [
                    cross_entropy(head(state).float(), token, reduction="none").double().sum()
                    for state, token in zip(*chunks, strict=True)
                ]
                losses.nats[n] = float(sum(nats))
                losses.tokens[n], losses.bytes[n] = len(ids[n]), len(texts[n].encode())
            bar.update(len(batch))
    return losses


def plain_texts(plan: Plan) -> list[str]:
    """Return the texts that forgetting is measured on: prose, or what the embedded base learned."""
    if plan.model_id == "embedded" and not plan.model_path:
        rng = random.Random(0)
        return [article(condition, len(condition.facts), rng) for condition in conditions()[::3]]
    general = tomllib.loads((ASSETS / "general.toml").read_text(encoding="utf-8"))
    return [paragraph["text"] for paragraph in general["paragraph"]]


# ---- intervals -----------------------------------------------------------------------------------
def interval(values: Values, groups: Groups = None) -> Interval:
    """Return (mean, low, high), a 95 % interval. NaN values are left out.

    Percentile bootstrap (Efron, 1979) of whole ``groups``, the diseases of the rows, because rows
    of one disease tend to stand or fall together (Field and Welsh, 2007; for language models:
    Miller, 2024, arXiv 2411.00640). A row without a group is one of its own. Under about 30 groups
    the interval is somewhat too narrow. The ends are NaN if every resample has the same mean: of
    equal values, equal groups or a single one.

    A column of only 0 and 1 gets Wilson's interval at ``effective_rows``, never of width 0.
    """
    (column,), labels = _complete(groups, values)
    if {*column} <= {0.0, 1.0}:
        mean = float(column.mean())
        return mean, *wilson(mean, effective_rows(column, labels))
    return _ratio(column, numpy.ones(len(labels)), labels)


def paired_interval(before: Values, after: Values, groups: Groups = None) -> Interval:
    """Return (mean, low, high) of ``after - before``, row by row: a bootstrap as in ``interval``.

    It has width 0 for shares with one and the same difference c in each row. By Wilson, at most a
    share u of other rows differs from c, to -1 or 1: the ends are c - u (c + 1) and c + u (1 - c).
    """
    (a, b), labels = _complete(groups, before, after)
    difference = b - a
    if {*a, *b} <= {0.0, 1.0} and numpy.ptp(difference) == 0:
        c, (_, u) = float(difference[0]), wilson(0, effective_rows(difference, labels))
        return c, c - u * (c + 1), c + u * (1 - c)
    return _ratio(difference, numpy.ones(len(labels)), labels)


def bits_per_byte(nats: numpy.ndarray, bytes: numpy.ndarray, groups: Groups = None) -> Interval:
    """Return (bits for each byte of all texts, low, high); of a gain in nats: the paired gain."""
    return _ratio(nats / math.log(2), bytes, groups)


def perplexity(nats: numpy.ndarray, tokens: numpy.ndarray, groups: Groups = None) -> Interval:
    """Return (exp of the mean nats a token, low, high); of a gain in nats: the paired ratio."""
    mean, low, high = map(math.exp, _ratio(nats, tokens, groups))
    return mean, low, high


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return the 95 % interval of a share of ``n`` rows (Wilson, 1927); n need not be whole."""
    centre, z2 = share + Z**2 / (2 * n), Z**2
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return max(0.0, low) if share else 0.0, min(1.0, high) if share < 1 else 1.0


def effective_rows(values: numpy.ndarray, groups: Groups = None) -> float:
    """Return how many independent rows would tell as much about the mean as these rows do.

    That is n over the design effect (Kish, 1965), at most n, as Franco et al. (2019, J. Surv. Stat.
    Methodol. 7) recommend for Wilson's interval. Equal values, or a single group, do not show how
    alike the rows of a group are: then each group counts as copies of one row, the worst case.
    """
    labels, n = group_numbers(groups, len(values)), len(values)
    sizes, gaps = numpy.bincount(labels), values - numpy.mean(values)
    if len(sizes) == 1 or numpy.ptp(values) == 0:
        return float(n**2 / (sizes**2).sum())
    between = (numpy.bincount(labels, gaps) ** 2).sum()
    return float(n * min(1.0, (gaps**2).sum() / between)) if between else float(n)


def p_value(differences: Values, groups: Groups = None) -> float:
    """Return the two-sided p-value of "the mean is 0" for paired differences.

    Approximate randomisation (Noreen, 1989): if two arms are equal, the sum of a group could as
    well have the other sign. The p-value is the share of random signs whose total is as far from 0,
    counting one more. Fewer than six groups cannot get below 5 %.
    """
    (column,), labels = _complete(groups, differences)
    sums = numpy.bincount(labels, column)
    signs = numpy.random.default_rng(0).choice([-1, 1], (RESAMPLES, len(sums)))
    extreme = numpy.abs(signs @ sums) >= abs(sums.sum()) - 1e-12
    return float((extreme.sum() + 1) / (RESAMPLES + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for the number of comparisons (Holm, 1979), in the given order."""
    order = numpy.argsort(p_values)
    raised = numpy.array(p_values)[order] * numpy.arange(len(order), 0, -1)
    corrected = numpy.maximum.accumulate(raised).clip(max=1)
    return [float(p) for p in corrected[numpy.argsort(order)]]


def group_numbers(groups: Groups, n: int) -> numpy.ndarray:
    """Number the groups of n rows from 0; a row without a group is one of its own."""
    if groups is None:
        return numpy.arange(n)
    # A missing disease is None, "" or NaN, which differs from itself.
    keys = [object() if g is None or g == "" or g != g else g for g in groups]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return numpy.array([numbers[key] for key in keys])


def _complete(groups: Groups, *columns: Values) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the rows without a NaN, shape (columns, rows), and their numbered groups."""
    table = numpy.stack([numpy.asarray(column, dtype=float) for column in columns])
    whole = numpy.isfinite(table).all(axis=0)
    if not whole.any():
        raise CourseError("no value to take a mean of: expected at least one row that was scored.")
    labels = group_numbers(groups, len(whole))[whole]
    return table[:, whole], numpy.unique(labels, return_inverse=True)[1]


def _ratio(over: Values, under: Values, groups: Groups) -> Interval:
    """Return sum(over) / sum(under) with its bootstrap interval; NaN ends if it has no width."""
    table, labels = _complete(groups, over, under)
    tops, bottoms = (numpy.bincount(labels, column) for column in table)
    # Whole groups are drawn with replacement: what is above the line stays with what is below it.
    draws = numpy.random.default_rng(0).integers(0, len(tops), (RESAMPLES, len(tops)))
    ratios = tops[draws].sum(axis=1) / bottoms[draws].sum(axis=1)
    low, high = numpy.quantile(ratios, [0.025, 0.975])
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-12):  # equal but for rounding
        low = high = math.nan
    return float(tops.sum() / bottoms.sum()), float(low), float(high)
