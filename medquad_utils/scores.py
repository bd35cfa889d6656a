"""Score answers: likeness to references, likelihood under a model, confidence intervals.

Functions that compare take ``answers``, one text a row, and ``references``, one text or several a
row, of which the best counts. They return a float64 array of shape (rows,). An empty answer scores
0; ``None`` and NaN count as empty. A row without a reference raises a ``CourseError``.
"""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from medquad_utils import CourseError
from medquad_utils.assets.sample import article, conditions, facts_of
from medquad_utils.chat import end_ids, prompt_ids, without_tokens
from medquad_utils.files import Row
from medquad_utils.machine import hub_reachable
from medquad_utils.profiles import Plan
from medquad_utils.splits import normalise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

References = Sequence[str] | Sequence[Sequence[str]]
Interval = tuple[float, float, float]  # the value, and both ends of its 95 % interval

GENERAL = Path(__file__).parent / "assets" / "general.toml"

# The model, its commit and the layer that the authors of BERTScore chose for English.
BERT_MODEL, BERT_LAYER = "FacebookAI/roberta-large", 17
BERT_REVISION = "722cf37b1afa9454edce342e7895e588b6ff1d59"


class Score(NamedTuple):
    """The meaning of a number: name in tables, unit, better direction, what it measures."""

    name: str
    unit: str
    better: str  # "up", "down" or "near 1"
    what: str


SCORES: dict[str, Score] = {
    "rouge1": Score("ROUGE-1", "0 to 1", "up", "words shared with the reference, in any order"),
    "rouge2": Score("ROUGE-2", "0 to 1", "up", "pairs of neighbouring words shared"),
    "rougeL": Score("ROUGE-L", "0 to 1", "up", "longest common sequence of words, gaps allowed"),
    "bleu": Score("BLEU", "0 to 1", "up", "shared runs of one to four words; short answers lose"),
    "chrf": Score("chrF", "0 to 1", "up", "shared runs of one to six characters"),
    "tfidf_cosine": Score("TF-IDF cosine", "0 to 1", "up", "shared words, rare ones count more"),
    "bert_score": Score("BERTScore", "up to 1", "up", "words matched by a model's vectors"),
    "facts_complete": Score("all facts", "share", "up", "answers with every fact (sample only)"),
    "length_ratio": Score("length", "x reference", "near 1", "words for each reference word"),
    "repetition": Score("repetition", "0 to 1", "down", "runs of four words said before"),
    "stop_rate": Score("stopped", "share", "up", "answers that end before the length limit"),
    "bits_per_byte": Score("bits per byte", "bits", "down", "cost of predicting the reference"),
    "perplexity": Score("perplexity", "tokens", "down", "equally likely tokens at each step"),
}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""  # None and NaN stand in a table's empty cells


def _rows(answers: Sequence[str], references: References) -> list[tuple[str, list[str]]]:
    """Pair each answer with its references; what is not text is dropped."""
    rows = []
    for number, (answer, given) in enumerate(zip(answers, references, strict=True)):
        several = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        texts = [text for text in several if isinstance(text, str)]
        if not texts:
            raise CourseError(f"row {number} has no reference answer: leave it out of the scoring.")
        rows.append((_text(answer), texts))
    return rows


def _best(
    answers: Sequence[str], references: References, score: Callable[[str, str], float]
) -> numpy.ndarray:
    rows = _rows(answers, references)
    return numpy.array([max(score(a, text) for text in texts) for a, texts in rows], dtype=float)


# ---- likeness ------------------------------------------------------------------------------------


@lru_cache(1 << 16)
def _stems(word: str) -> list[str]:
    from rouge_score.tokenizers import DefaultTokenizer

    return list(DefaultTokenizer(use_stemmer=True).tokenize(word))


@lru_cache(1 << 12)
def _words(text: str) -> list[str]:
    """The words of ``rouge_score`` with stemming; cached, because stemming is most of its work."""
    return [stem for word in text.split() for stem in _stems(word)]


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a table row as the bits of an int (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    row = ones = (1 << len(a)) - 1
    for word in b:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & ones
    return len(a) - row.bit_count()


def rouge(answers: Sequence[str], references: References) -> dict[str, numpy.ndarray]:
    """Compute ROUGE-1, ROUGE-2 and ROUGE-L F1 (Lin, 2004; Google's ``rouge_score``, stemmed).

    Only a-z and 0-9 make words: text in another script scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2"]
    scorer = RougeScorer(kinds, tokenizer=SimpleNamespace(tokenize=_words))
    table = [
        [scorer.score(t, answer) for t in texts] for answer, texts in _rows(answers, references)
    ]
    best = {k: [max(score[k].fmeasure for score in row) for row in table] for k in kinds}
    columns = {k: numpy.array(values, dtype=float) for k, values in best.items()}
    return columns | {"rougeL": rouge_l(answers, references)}


def rouge_l(answers: Sequence[str], references: References) -> numpy.ndarray:
    """Compute ROUGE-L F1 alone (see ``rouge``), 60 times faster than ``rouge_score`` does."""

    def f1(answer: str, reference: str) -> float:
        a, b = _words(answer), _words(reference)
        common = _longest_common(a, b)
        return 2 * common / (len(a) + len(b)) if common else 0.0

    return _best(answers, references, f1)


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
    answers: Sequence[str], references: References, corpus: Sequence[str] | None = None
) -> numpy.ndarray:
    """Compute the cosine of TF-IDF vectors, 0 to 1 (Salton and Buckley, 1988; scikit-learn).

    ``corpus`` (default: the references) gives the document frequencies. It ignores other words.
    """
    rows = _rows(answers, references)
    places = numpy.repeat(numpy.arange(len(rows)), [len(texts) for _, texts in rows])
    flat, best = [text for _, texts in rows for text in texts], numpy.zeros(len(rows))
    vectoriser = _vectoriser(tuple(flat if corpus is None else corpus))
    if vectoriser and rows:
        answered = vectoriser.transform([answer for answer, _ in rows])[places]
        cosines = numpy.asarray(answered.multiply(vectoriser.transform(flat)).sum(axis=1)).ravel()
        numpy.maximum.at(best, places, cosines)
    return best.clip(0, 1)


@lru_cache(2)  # every arm is scored with the same corpus
def _vectoriser(corpus: tuple[str, ...]) -> Any:
    """A fitted vectoriser, or None for a corpus without a word."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer(token_pattern=r"\w+")
    return vectoriser.fit(corpus) if any(map(vectoriser.build_analyzer(), corpus)) else None


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
    words = [normalise(_text(answer)).split() for answer in answers]
    runs = [list(zip(w, w[1:], w[2:], w[3:], strict=False)) for w in words]
    return numpy.array([1 - len(set(r)) / len(r) if r else 0.0 for r in runs], dtype=float)


def facts_complete(answers: Sequence[str], rows: Sequence[Row]) -> numpy.ndarray:
    """Mark answers that hold every fact of their row, word for word, as bools.

    Only the embedded sample lists facts; rows of other sources are left out of the array.
    """
    complete = []
    for answer, row in zip(answers, rows, strict=True):
        ours = row["source"] == "course sample"
        if facts := facts_of(row["focus"] or "", row["qtype"]) if ours else []:
            text = f" {normalise(_text(answer))} "
            complete.append(all(f" {normalise(fact)} " in text for fact in facts))
    return numpy.array(complete, dtype=bool)


# ---- BERTScore -----------------------------------------------------------------------------------


def bert_score(
    answers: Sequence[str], references: References,
    source: str = BERT_MODEL, layer: int = BERT_LAYER,
) -> numpy.ndarray:  # fmt: skip
    """Compute BERTScore F1 (Zhang et al., 2020, arXiv 1904.09675), no idf weights, no rescaling.

    ``layer`` 0 is the embedding. Texts are cut at 512 tokens. The authors' package gives the same
    numbers, but it takes no revision and fails on an empty answer under transformers 5.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    revision = BERT_REVISION if source == BERT_MODEL else None
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, add_prefix_space=True)
    model = AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    options = {"truncation": True, "max_length": min(tokenizer.model_max_length, 512)}

    @lru_cache(16)  # answers to one question come one after another: they share references
    def embed(text: str) -> torch.Tensor:  # unit vectors, (tokens, width)
        batch = tokenizer(text.strip(), return_tensors="pt", **options).to(model.device)
        with torch.inference_mode():
            states = model(**batch, output_hidden_states=True).hidden_states[layer][0]
        return torch.nn.functional.normalize(states, dim=-1)

    def f1(answer: str, reference: str) -> float:
        cosines = embed(answer) @ embed(reference).T
        if min(cosines.shape) < 3:  # start and end token only: one text is empty
            return 0.0
        # Start and end may be matched, but are not counted.
        p, r = (float(best[1:-1].mean()) for best in (cosines.amax(1), cosines.amax(0)))
        return 2 * p * r / (p + r) if p + r else 0.0

    return _best(answers, references, f1)


def bert_score_or_reason(
    answers: Sequence[str], references: References
) -> tuple[numpy.ndarray | None, str]:
    """Return (BERTScore, ""), or (None, why not): the model is 1.4 GB and slow without a GPU."""
    import torch
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(BERT_MODEL, "config.json", revision=BERT_REVISION)
    try:
        if not isinstance(cached, str) and not hub_reachable():
            return None, "the Hub is out of reach (roberta-large is not in the local cache)"
        if not isinstance(cached, str) and not torch.cuda.is_available():
            fetch = f"hf download {BERT_MODEL} --revision {BERT_REVISION}"
            return None, f"roberta-large is 1.4 GB and slow without a GPU: to use it, run {fetch}"
        return bert_score(answers, references), ""
    except Exception as error:  # a failed download must not cost the other scores
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return None, f"roberta-large does not load ({reason})"


# ---- likelihood ----------------------------------------------------------------------------------


class Losses(NamedTuple):
    """Likelihood of texts under a model; float64, shape (rows,). NaN: the text was not scored."""

    nats: numpy.ndarray  # negative log-likelihood, summed over the text's tokens
    tokens: numpy.ndarray
    bytes: numpy.ndarray  # of the text in UTF-8


def answer_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]], references: Sequence[str],
    batch_size: int = 16, progress: str = "",
) -> Losses:  # fmt: skip
    """Score each reference after its conversation (lists of messages), by teacher forcing.

    The prompt and the end-of-turn token do not count: the latter has no bytes. A row that is empty
    or longer than the model's context is not cut; it is NaN, for the caller to count.
    """
    texts = [without_tokens(_text(reference).strip()) for reference in references]
    prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    return _losses(model, tokenizer, prompts, texts, batch_size, progress)


def text_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str],
    batch_size: int = 16, progress: str = "",
) -> Losses:  # fmt: skip
    """Score plain ``texts`` from their first token on, after a begin-of-text token."""
    begin = next(i for i in (tokenizer.bos_token_id, *end_ids(tokenizer)) if i is not None)
    texts = [without_tokens(_text(text)) for text in texts]
    return _losses(model, tokenizer, [[begin]] * len(texts), texts, batch_size, progress)


def _losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]],
    texts: Sequence[str], batch_size: int, progress: str,
) -> Losses:  # fmt: skip
    from tqdm.auto import tqdm

    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    lengths = [len(prompt) + len(scored) for prompt, scored in zip(prompts, ids, strict=True)]
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    fitting = [n for n, length in enumerate(lengths) if ids[n] and length <= limit]
    batches = list(_batches(sorted(fitting, key=lengths.__getitem__), lengths, batch_size))
    losses = Losses(*(numpy.full(len(texts), numpy.nan) for _ in Losses._fields))
    for chosen in tqdm(batches, desc=progress, disable=not progress):
        losses.nats[chosen] = _nats(model, [(prompts[n], ids[n]) for n in chosen])
        losses.tokens[chosen] = [len(ids[n]) for n in chosen]
        losses.bytes[chosen] = [len(texts[n].encode()) for n in chosen]
    return losses


def _batches(
    order: Sequence[int], lengths: Sequence[int], rows: int, tokens: int = 8192
) -> Iterator[list[int]]:
    """Split ``order`` (shortest first) by ``rows`` and by ``tokens`` with padding."""
    batch: list[int] = []
    for n in order:
        if batch and (len(batch) == rows or (len(batch) + 1) * lengths[n] > tokens):
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def _nats(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[float]:
    """Sum the negative log-likelihood of each pair's second ids after its first ids."""
    import torch

    shape = len(pairs), max(len(prompt) + len(ids) for prompt, ids in pairs)
    inputs, real = (torch.zeros(shape, dtype=torch.long, device=model.device) for _ in range(2))
    before = torch.zeros(shape, dtype=torch.bool, device=model.device)
    for row, (prompt, ids) in enumerate(pairs):
        end = len(prompt) + len(ids)
        inputs[row, :end] = torch.tensor([*prompt, *ids])
        real[row, :end] = 1
        before[row, len(prompt) - 1 : end - 1] = True
    targets = torch.tensor([i for _, ids in pairs for i in ids], device=model.device)
    with torch.inference_mode():
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        hidden = decoder(input_ids=inputs, attention_mask=real, use_cache=False).last_hidden_state
        # 512 positions at a time: (batch, time, vocabulary) would be the largest thing in memory.
        parts = [
            torch.nn.functional.cross_entropy(head(s).float(), t, reduction="none")
            for s, t in zip(hidden[before].split(512), targets.split(512), strict=True)
        ]
    sums = torch.cat(parts).double().split([len(ids) for _, ids in pairs])
    return [float(part.sum()) for part in sums]


def plain_texts(plan: Plan) -> list[str]:
    """Return the texts that forgetting is measured on: articles for the embedded base, else prose.

    The articles cover every third condition in the wording of pretraining; thirty general
    paragraphs (``assets/general.toml``) serve any other model.
    """
    if plan.model_id == "embedded" and not plan.model_path:
        rng = random.Random(0)
        return [article(condition, len(condition.facts), rng) for condition in conditions()[::3]]
    return [p["text"] for p in tomllib.loads(GENERAL.read_text(encoding="utf-8"))["paragraph"]]


# ---- intervals -----------------------------------------------------------------------------------


def interval(
    values: numpy.ndarray | Sequence[float], seed: int = 0, resamples: int = 2000
) -> Interval:
    """Return (mean, low, high): the 95 % percentile bootstrap interval (Efron, 1979; scipy).

    NaN values are left out. Equal values, or a single one, give a point.
    """
    return _bootstrap(lambda x, axis: x.mean(axis=axis), [values], seed, resamples)


def paired_interval(
    before: numpy.ndarray | Sequence[float], after: numpy.ndarray | Sequence[float], seed: int = 0
) -> Interval:
    """Return (mean, low, high) of ``after - before``, row by row (see ``interval``)."""
    a, b = numpy.asarray(before, dtype=float), numpy.asarray(after, dtype=float)
    if a.shape != b.shape:
        raise CourseError(f"cannot pair {len(a)} and {len(b)} values: expected the same rows.")
    return interval(b - a, seed)


def bits_per_byte(nats: numpy.ndarray, bytes: numpy.ndarray, seed: int = 0) -> Interval:
    """Return (value, low, high): bits for each byte of all texts; tokenizers of any kind compare.

    ``bits_per_byte(after.nats - before.nats, before.bytes)`` is the paired difference.
    """
    return _bootstrap(_ratio_of_sums, [nats / math.log(2), bytes], seed)


def perplexity(nats: numpy.ndarray, tokens: numpy.ndarray, seed: int = 0) -> Interval:
    """Return (value, low, high): exp of the mean nats a token, for models with one tokenizer.

    ``perplexity(after.nats - before.nats, before.tokens)`` is the paired ratio.
    """
    mean, low, high = map(math.exp, _bootstrap(_ratio_of_sums, [nats, tokens], seed))
    return mean, low, high


def _ratio_of_sums(a: numpy.ndarray, b: numpy.ndarray, axis: int) -> numpy.ndarray:
    ratio: numpy.ndarray = a.sum(axis=axis) / b.sum(axis=axis)
    return ratio


def _bootstrap(
    statistic: Callable[..., Any], samples: Sequence[Any], seed: int = 0, resamples: int = 2000
) -> Interval:
    """Resample whole rows; rows with a NaN in any sample are left out."""
    from scipy.stats import bootstrap

    table = numpy.array([numpy.asarray(sample, dtype=float) for sample in samples])
    table = table[:, numpy.isfinite(table).all(axis=0)]
    if not table.shape[1]:
        raise CourseError("no value to take a mean of: expected at least one row that was scored.")
    if (table == table[:, :1]).all():  # scipy would give NaN
        value = float(statistic(*table[:, :1], axis=-1))
        return value, value, value
    ends = bootstrap(
        table, statistic, n_resamples=resamples, paired=True, vectorized=True, method="percentile",
        batch=max(1, 100_000 // table.shape[1]), rng=numpy.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(statistic(*table, axis=-1)), float(ends.low), float(ends.high)
