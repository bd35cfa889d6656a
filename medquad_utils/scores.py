"""Text in, numbers out: how alike an answer and its references are, how likely a model finds a text, and how sure a mean is.

Every function that compares takes ``answers``, one text a row, and ``references``, one text or several a row, of which
the best counts. It returns a float64 array of shape (rows,). An empty answer scores 0; ``None`` and NaN count as empty.
A row without any reference raises a ``CourseError`` that names it.
"""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
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
Interval = tuple[float, float, float]  # the value, and the lower and upper end of its 95 % interval

GENERAL = Path(__file__).parent / "assets" / "general.toml"

# The model and the layer that the authors of BERTScore chose for English, at a fixed commit.
BERT_MODEL, BERT_REVISION, BERT_LAYER = (
    "FacebookAI/roberta-large",
    "722cf37b1afa9454edce342e7895e588b6ff1d59",
    17,
)


@dataclass(frozen=True)
class Score:
    """What a number means: its ``name`` in tables, its ``unit``, which way is ``better``, and ``what`` it measures."""

    name: str
    unit: str
    better: str  # "up", "down" or "near 1"
    what: str


SCORES: dict[str, Score] = {
    "rouge1": Score("ROUGE-1", "0 to 1", "up", "words shared with the reference, in any order"),
    "rouge2": Score(
        "ROUGE-2", "0 to 1", "up", "pairs of neighbouring words shared with the reference"
    ),
    "rougeL": Score(
        "ROUGE-L",
        "0 to 1",
        "up",
        "the longest run of words that both hold in the same order, gaps allowed",
    ),
    "bleu": Score(
        "BLEU",
        "0 to 1",
        "up",
        "runs of one to four words that the reference holds too; short answers lose",
    ),
    "chrf": Score(
        "chrF",
        "0 to 1",
        "up",
        "runs of one to six characters shared with the reference; what is left out costs most",
    ),
    "tfidf_cosine": Score(
        "TF-IDF cosine", "0 to 1", "up", "words shared with the reference, rare words counting more"
    ),
    "bert_score": Score(
        "BERTScore",
        "up to 1",
        "up",
        "each word matched with the closest in meaning, by a language model's vectors",
    ),
    "facts_complete": Score(
        "all facts",
        "share",
        "up",
        "answers that hold every fact of the reference (embedded sample only)",
    ),
    "length_ratio": Score(
        "length", "x reference", "near 1", "words of the answer for each word of the reference"
    ),
    "repetition": Score(
        "repetition", "0 to 1", "down", "runs of four words that the same answer has said before"
    ),
    "stop_rate": Score(
        "stopped", "share", "up", "answers that end by themselves before the length limit"
    ),
    "bits_per_byte": Score(
        "bits per byte",
        "bits",
        "down",
        "how badly the model predicts the reference, for each byte of it",
    ),
    "perplexity": Score(
        "perplexity",
        "tokens",
        "down",
        "among how many tokens the model is torn at each step, on average",
    ),
}


def _text(value: Any) -> str:
    """``value`` if it is text; None and NaN, as a table has them in an empty cell, count as empty."""
    return value if isinstance(value, str) else ""


def _rows(answers: Sequence[str], references: References) -> list[tuple[str, list[str]]]:
    """(answer, its references) a row, with everything that is no text out of the way."""
    rows = []
    for number, (answer, given) in enumerate(zip(answers, references, strict=True)):
        several = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        known = [text for text in several if isinstance(text, str)]
        if not known:
            raise CourseError(
                f"row {number} has no reference answer: expected at least one. Leave the row out of the scoring."
            )
        rows.append((_text(answer), known))
    return rows


def _best(
    answers: Sequence[str], references: References, score: Callable[[str, str], float]
) -> numpy.ndarray:
    """The best score of each answer over its references."""
    return numpy.array(
        [
            max(score(answer, text) for text in known)
            for answer, known in _rows(answers, references)
        ],
        dtype=float,
    )


# ---- likeness -------------------------------------------------------------------------------------------------------


@cache
def _rouge_scorer() -> Any:
    """rouge-score's own, with a tokenizer that remembers words: stemming is most of its work, and words come back."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2"], use_stemmer=True)
    stems = lru_cache(1 << 16)(scorer._tokenizer.tokenize)
    scorer._tokenizer.tokenize = lru_cache(1 << 12)(
        lambda text: [token for word in text.split() for token in stems(word)]
    )
    return scorer


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as the bits of one integer (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    everywhere = (1 << len(a)) - 1
    row = everywhere
    for word in b:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & everywhere
    return len(a) - row.bit_count()


def rouge(answers: Sequence[str], references: References) -> dict[str, numpy.ndarray]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F1, 0 to 1, best reference each (Lin, 2004; Google's ``rouge_score`` with stemming).

    It keeps a-z and 0-9 only: text in another script has no words and scores 0, and an accent parts a word in two.
    """
    scorer = _rouge_scorer()
    found = [
        [scorer.score(text, answer) for text in known]
        for answer, known in _rows(answers, references)
    ]
    shared = {
        kind: numpy.array([max(s[kind].fmeasure for s in row) for row in found], dtype=float)
        for kind in ("rouge1", "rouge2")
    }
    return shared | {"rougeL": rouge_l(answers, references)}


def rouge_l(answers: Sequence[str], references: References) -> numpy.ndarray:
    """ROUGE-L F1 alone (see ``rouge``): Google's words and numbers; long answers take a sixtieth of the time of its table in Python."""
    words = _rouge_scorer()._tokenizer.tokenize

    def f1(answer: str, reference: str) -> float:
        a, b = words(answer), words(reference)
        common = _longest_common(a, b)
        return 2 * common / (len(a) + len(b)) if common else 0.0

    return _best(answers, references, f1)


def bleu(answers: Sequence[str], references: References) -> numpy.ndarray:
    """Sentence BLEU, 0 to 1, best reference (Papineni et al., 2002; sacrebleu, Post, 2018).

    Effective order: an answer of under four words is judged on the runs that it can have. Where no run of some length
    is shared, sacrebleu's exponential smoothing steps in.
    """
    from sacrebleu.metrics import BLEU

    scorer = BLEU(effective_order=True)
    return _best(
        answers, references, lambda a, r: min(1.0, scorer.sentence_score(a, [r]).score / 100)
    )  # 100.00000000000004 happens


def chrf(answers: Sequence[str], references: References) -> numpy.ndarray:
    """Sentence chrF2, 0 to 1, best reference (Popović, 2015; sacrebleu): works in every script."""
    from sacrebleu.metrics import CHRF

    scorer = CHRF()
    return _best(answers, references, lambda a, r: scorer.sentence_score(a, [r]).score / 100)


def corpus_bleu(answers: Sequence[str], references: References) -> float:
    """BLEU of all answers together, 0 to 1, as papers report it: runs of words are counted over all rows.

    With several references, a run counts if any of them holds it, and the nearest length is the one to reach.
    """
    from sacrebleu.metrics import BLEU

    return _of_corpus(BLEU(), answers, references)


def corpus_chrf(answers: Sequence[str], references: References) -> float:
    """chrF2 of all answers together, 0 to 1; the best reference of a row counts."""
    from sacrebleu.metrics import CHRF

    return _of_corpus(CHRF(), answers, references)


def _of_corpus(scorer: Any, answers: Sequence[str], references: References) -> float:
    rows = _rows(answers, references)
    if not rows:
        raise CourseError("no answers to score: expected at least one row.")
    # sacrebleu wants streams: all first references, all second ones, and so on; None where a row has no more.
    streams = [
        [known[n] if n < len(known) else None for _, known in rows]
        for n in range(max(len(known) for _, known in rows))
    ]
    return float(scorer.corpus_score([answer for answer, _ in rows], streams).score) / 100


def tfidf_cosine(
    answers: Sequence[str], references: References, corpus: Sequence[str] | None = None
) -> numpy.ndarray:
    """Cosine of the TF-IDF vectors of answer and best reference, 0 to 1 (Salton and Buckley, 1988; scikit-learn).

    How rare a word is, ``corpus`` says (the training answers), or else the references. A word that it lacks is not seen.
    """
    rows = _rows(answers, references)
    places = numpy.repeat(numpy.arange(len(rows)), [len(known) for _, known in rows])
    flat = [text for _, known in rows for text in known]
    best = numpy.zeros(len(rows))
    if (vectoriser := _vectoriser(tuple(flat if corpus is None else corpus))) is not None and rows:
        said, known = (
            vectoriser.transform([answer for answer, _ in rows]),
            vectoriser.transform(flat),
        )
        numpy.maximum.at(
            best, places, numpy.asarray(said[places].multiply(known).sum(axis=1)).ravel()
        )
    return best.clip(0, 1)


@lru_cache(2)
def _vectoriser(corpus: tuple[str, ...]) -> Any:
    """A fitted vectoriser, or None for a corpus without a word; kept, because every arm is scored with the same one."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer(token_pattern=r"\w+")
    return vectoriser.fit(corpus) if any(map(vectoriser.build_analyzer(), corpus)) else None


def length_ratio(answers: Sequence[str], references: References) -> numpy.ndarray:
    """Words of the answer for each word of the reference that is nearest in length (the shorter one of two equally near)."""
    ratios = []
    for answer, known in _rows(answers, references):
        words = len(answer.split())
        nearest = min((len(text.split()) for text in known), key=lambda n: (abs(n - words), n))
        ratios.append(words / max(1, nearest))
    return numpy.array(ratios, dtype=float)


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def repetition(answers: Sequence[str]) -> numpy.ndarray:
    """Share of an answer's runs of four words that it has said before, 0 to 1; 0 for answers of under five words.

    Case and punctuation do not count. (Welleck et al., 2020, arXiv 1908.04319: seq-rep-4.)
    """
    runs = [_ngrams(normalise(_text(answer)).split(), 4) for answer in answers]
    return numpy.array([1 - len(set(r)) / len(r) if r else 0.0 for r in runs], dtype=float)


def facts_complete(answers: Sequence[str], rows: Sequence[Row]) -> numpy.ndarray:
    """True where an answer holds every fact of its row, word for word (case and punctuation aside).

    Only the embedded sample lists the facts of an answer; rows of other sources are left out of the array.
    """
    complete = []
    for answer, row in zip(answers, rows, strict=True):
        facts = (
            facts_of(row["focus"] or "", row["qtype"]) if row["source"] == "course sample" else []
        )
        if facts:
            said = f" {normalise(_text(answer))} "
            complete.append(all(f" {normalise(fact)} " in said for fact in facts))
    return numpy.array(complete, dtype=bool)


# ---- BERTScore ------------------------------------------------------------------------------------------------------


def bert_score(
    answers: Sequence[str],
    references: References,
    model_source: str = BERT_MODEL,
    layer: int | None = None,
    batch_size: int = 32,
) -> numpy.ndarray:
    """BERTScore F1, best reference (Zhang et al., 2020, arXiv 1904.09675), without idf weights and without rescaling.

    Every token of the answer is matched with the reference's token of nearest vector (precision), and the other way
    round (recall). Start and end tokens may be matched but are not counted. ``layer`` 0 is the embedding; by default it
    is 17 for roberta-large, as in the authors' package, and the last one for another model. Texts are cut at 512 tokens,
    which is what such a model reads. The authors' package (``bert-score`` 0.3.13) is not used: it takes no revision, and
    under transformers 5 it fails on an empty answer and loses the space before a text's first word, which it had asked
    for; with that space put back it gives the same numbers.

    Raises:
        OSError: the model is neither a folder, nor in the local cache, nor on the Hub within reach.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    rows = _rows(answers, references)
    pairs = [
        (number, answer, text) for number, (answer, known) in enumerate(rows) for text in known
    ]
    pairs.sort(key=lambda pair: len(pair[1]) + len(pair[2]))
    ours = model_source == BERT_MODEL
    revision = BERT_REVISION if ours else None
    tokenizer = AutoTokenizer.from_pretrained(
        model_source, revision=revision, add_prefix_space=True
    )
    model = AutoModel.from_pretrained(model_source, revision=revision, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    chosen = layer if layer is not None else BERT_LAYER if ours else -1

    def embed(texts: Sequence[str]) -> list[tuple[Any, Any]]:
        """(unit vectors, which of them count) of each text; shapes (tokens, width) and (tokens,)."""
        texts, length = [text.strip() for text in texts], min(tokenizer.model_max_length, 512)
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            hidden = model(**batch, output_hidden_states=True).hidden_states[chosen]
        edges = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id], device=model.device)
        real, counted = batch["attention_mask"].bool(), ~torch.isin(batch["input_ids"], edges)
        return [
            (torch.nn.functional.normalize(h[r], dim=-1), c[r])
            for h, r, c in zip(hidden, real, counted, strict=True)
        ]

    best = numpy.full(len(rows), -1.0)
    for start in range(0, len(pairs), batch_size):
        numbers, said, known = zip(*pairs[start : start + batch_size], strict=True)
        for number, (a, in_a), (b, in_b) in zip(numbers, embed(said), embed(known), strict=True):
            alike, f1 = a @ b.T, 0.0
            if in_a.any() and in_b.any():
                precision, recall = (
                    alike.amax(1)[in_a].mean().item(),
                    alike.amax(0)[in_b].mean().item(),
                )
                f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
            best[number] = max(best[number], f1)
    return best


def bert_score_or_reason(
    answers: Sequence[str],
    references: References,
    model_source: str = BERT_MODEL,
    layer: int | None = None,
) -> tuple[numpy.ndarray | None, str]:
    """(BERTScore, "") where its model is to be had, else (None, why not).

    roberta-large is 1.4 GB: it is fetched from the Hub, once, where there is a GPU to run it on, and used on a CPU where it
    has been fetched on purpose.
    """
    import torch
    from huggingface_hub import try_to_load_from_cache

    name, revision = (
        model_source.rsplit("/", 1)[-1],
        BERT_REVISION if model_source == BERT_MODEL else None,
    )
    try:
        here = Path(model_source).is_dir() or isinstance(
            try_to_load_from_cache(model_source, "config.json", revision=revision), str
        )
        if not here and not hub_reachable():
            return None, f"the Hub is out of reach ({name} is not in the local cache)"
        if not here and not torch.cuda.is_available():
            fetch = f"hf download {model_source} --revision {revision}"
            return (
                None,
                f"{name} is a download of 1.4 GB and slow without a GPU: fetch it with {fetch}, and it is used",
            )
        return bert_score(answers, references, model_source, layer), ""
    except Exception as error:  # a download can fail in many ways, and none of them may cost the reader the other scores
        return (
            None,
            f"{name} does not load ({(str(error).strip() or type(error).__name__).splitlines()[0][:200]})",
        )


# ---- likelihood -----------------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """How likely a model finds each text; float64 arrays of shape (rows,). A text that was not scored has NaN in all three."""

    nats: numpy.ndarray  # negative log-likelihood, summed over the text's tokens
    tokens: numpy.ndarray
    bytes: numpy.ndarray  # of the text in UTF-8


def answer_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    references: Sequence[str],
    batch_size: int = 16,
    progress: str = "",
) -> Losses:
    """How likely ``model`` finds each reference answer after its conversation (lists of messages), by teacher forcing.

    Only the answer's own tokens count, not the prompt's. The end-of-turn token does not count either: it has no bytes,
    and whether a model stops is the stop rate's business. White space around an answer is trimmed, as the chat
    template does. One reference a row. A row that is longer than the model's context, or whose reference is empty, is
    not cut but left out: NaN, for the caller to count.
    """
    texts = [without_tokens(_text(reference).strip()) for reference in references]
    prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    return _losses(model, tokenizer, prompts, texts, batch_size, progress)


def text_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 16,
    progress: str = "",
) -> Losses:
    """How likely ``model`` finds plain ``texts``, each from its first token on, after a begin-of-text token.

    NaN for a text that is empty or longer than the model's context.
    """
    begin = next(i for i in (tokenizer.bos_token_id, *end_ids(tokenizer)) if i is not None)
    return _losses(
        model,
        tokenizer,
        [[begin]] * len(texts),
        [without_tokens(_text(text)) for text in texts],
        batch_size,
        progress,
    )


def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str],
    batch_size: int,
    progress: str,
) -> Losses:
    from tqdm.auto import tqdm

    scored = [
        list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in texts
    ]
    pairs = list(zip(prompts, scored, strict=True))
    lengths = [len(prompt) + len(ids) for prompt, ids in pairs]
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    kept = sorted(
        (n for n, (_, ids) in enumerate(pairs) if ids and lengths[n] <= limit),
        key=lengths.__getitem__,
    )
    losses = Losses(*(numpy.full(len(pairs), numpy.nan) for _ in Losses._fields))
    for chosen in tqdm(
        list(_batches(kept, lengths, batch_size)), desc=progress, disable=not progress
    ):
        losses.nats[chosen] = _nats(model, [pairs[n] for n in chosen])
        losses.tokens[chosen] = [len(scored[n]) for n in chosen]
        losses.bytes[chosen] = [len(texts[n].encode()) for n in chosen]
    return losses


def _batches(
    order: Sequence[int], lengths: Sequence[int], rows: int, tokens: int = 8192
) -> Iterator[list[int]]:
    """``order``, shortest first, in batches of up to ``rows`` rows and ``tokens`` tokens with the padding; a long row goes alone."""
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
    """Summed negative log-likelihood of the second list of ids after the first, for each pair: one right-padded batch.

    The head sees the positions before the scored tokens only, 512 at a time: logits of (batch, time, vocabulary) would be
    the largest thing in memory.
    """
    import torch

    width = max(len(prompt) + len(ids) for prompt, ids in pairs)
    inputs, real = (
        torch.zeros(len(pairs), width, dtype=torch.long),
        torch.zeros(len(pairs), width, dtype=torch.long),
    )
    before = torch.zeros(len(pairs), width, dtype=torch.bool)
    for row, (prompt, ids) in enumerate(pairs):
        end = len(prompt) + len(ids)
        inputs[row, :end] = torch.tensor([*prompt, *ids])
        real[row, :end] = 1
        before[row, len(prompt) - 1 : end - 1] = True
    targets = torch.tensor([i for _, ids in pairs for i in ids], device=model.device)
    with torch.inference_mode():
        hidden = model.get_decoder()(
            input_ids=inputs.to(model.device), attention_mask=real.to(model.device), use_cache=False
        )
        states, head = (
            hidden.last_hidden_state[before.to(model.device)],
            model.get_output_embeddings(),
        )
        parts = [
            torch.nn.functional.cross_entropy(head(s).float(), t, reduction="none")
            for s, t in zip(states.split(512), targets.split(512), strict=True)
        ]
    return [
        part.double().sum().item()
        for part in torch.cat(parts).split([len(ids) for _, ids in pairs])
    ]


def plain_texts(plan: Plan) -> list[str]:
    """What forgetting is measured on: the same texts before and after tuning, far from the tuning's question form.

    For the embedded base its own domain: articles about every third condition, in the wordings it was pretrained on. For
    any other model thirty general paragraphs (``assets/general.toml``).
    """
    if plan.model_id == "embedded" and not plan.model_path:
        rng = random.Random(0)
        return [article(condition, len(condition.facts), rng) for condition in conditions()[::3]]
    return [
        paragraph["text"]
        for paragraph in tomllib.loads(GENERAL.read_text(encoding="utf-8"))["paragraph"]
    ]


# ---- intervals ------------------------------------------------------------------------------------------------------


def interval(
    values: numpy.ndarray | Sequence[float], seed: int = 0, resamples: int = 2000
) -> Interval:
    """(mean, low, high): the mean with its 95 % bootstrap interval (Efron, 1979; percentile method, scipy).

    NaN values are left out. Equal values, or a single one, give a point.

    Raises:
        CourseError: no value is left.
    """
    return _bootstrap(lambda x, axis: x.mean(axis=axis), [values], seed, resamples)


def paired_interval(
    before: numpy.ndarray | Sequence[float], after: numpy.ndarray | Sequence[float], seed: int = 0
) -> Interval:
    """(mean, low, high) of ``after - before``, row by row: above 0 where ``after`` scores higher. See ``interval``."""
    a, b = numpy.asarray(before, dtype=float), numpy.asarray(after, dtype=float)
    if a.shape != b.shape:
        raise CourseError(
            f"{len(a)} and {len(b)} values cannot be paired: expected the same rows in the same order."
        )
    return interval(b - a, seed)


def mean_interval(
    values: numpy.ndarray, seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """(low, high) of ``interval``."""
    return interval(values, seed, resamples)[1:]


def bits_per_byte(nats: numpy.ndarray, bytes: numpy.ndarray, seed: int = 0) -> Interval:
    """(value, low, high): bits for each byte of the texts, all rows together; tokenizers of any kind compare.

    Rows are resampled whole, nats and bytes together. ``bits_per_byte(after.nats - before.nats, before.bytes)`` is the
    paired difference of two models.

    Raises:
        CourseError: no row was scored.
    """
    return _bootstrap(
        lambda n, b, axis: n.sum(axis=axis) / b.sum(axis=axis) / math.log(2), [nats, bytes], seed
    )


def perplexity(nats: numpy.ndarray, tokens: numpy.ndarray, seed: int = 0) -> Interval:
    """(value, low, high): exp of the mean nats a token, all rows together; compares models with the same tokenizer only.

    ``perplexity(after.nats - before.nats, before.tokens)`` is the paired ratio of two models' perplexities.

    Raises:
        CourseError: no row was scored.
    """
    return _bootstrap(
        lambda n, t, axis: numpy.exp(n.sum(axis=axis) / t.sum(axis=axis)), [nats, tokens], seed
    )


def _bootstrap(
    statistic: Callable[..., Any], samples: Sequence[Any], seed: int = 0, resamples: int = 2000
) -> Interval:
    """A statistic of paired samples with its 95 % percentile interval; rows with a NaN in any sample are left out."""
    from scipy.stats import bootstrap

    table = numpy.array([numpy.asarray(sample, dtype=float) for sample in samples])
    table = table[:, numpy.isfinite(table).all(axis=0)]
    rows = table.shape[1]
    if not rows:
        raise CourseError("no value to take a mean of: expected at least one row that was scored.")
    if (table == table[:, :1]).all():
        value = float(statistic(*table[:, :1], axis=-1))
        return value, value, value
    found = bootstrap(
        table, statistic, n_resamples=resamples, paired=True, vectorized=True, method="percentile",
        batch=max(1, 100_000 // rows), rng=numpy.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(statistic(*table, axis=-1)), float(found.low), float(found.high)
