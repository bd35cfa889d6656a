"""The card that a published model goes out with: every section, every number out of the run's own metrics files.

The sections are those of the Hub's card template, after Mitchell et al., Model Cards for Model Reporting, 2019 (arXiv 1810.03993).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medquad_utils.chat import NOTICE, SYSTEM_PROMPT, THREE_QUESTIONS
from medquad_utils.profiles import Plan
from medquad_utils.report import EMBEDDED, cell, escaped, number, sentence

MISSING = "not measured"
TAG = "medquad-qlora"  # in the metadata of every card of ours: how a later push knows the repository as its own
COURSE = "https://github.com/medquad-qlora/medquad-qlora"
DOI = "10.1186/s12859-019-3119-4"
PAPER = (
    "Asma Ben Abacha and Dina Demner-Fushman, A Question-Entailment Approach to Question Answering, "
    f"BMC Bioinformatics 2019, 20:511, https://doi.org/{DOI}"
)
HUB_DATA = "keivalya/MedQuad-MedicalQnADataset"


@dataclass(frozen=True)
class Licence:
    """What the licence of a base asks of whoever publishes a model made from it."""

    id: str  # in the Hub's list of licences
    name: str
    url: str
    agreement: str = ""  # the title of the agreement of which a copy has to go along; "" = none
    notice: str = ""  # the attribution that has to stand in NOTICE
    built: str = ""  # the words that have to stand in the card


_RIGHTS = "Copyright © Meta Platforms, Inc. All Rights Reserved."
LICENCES = {
    licence.id: licence
    for licence in (
        Licence("apache-2.0", "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
        Licence(
            "llama3", "Meta Llama 3 Community License", "https://llama.meta.com/llama3/license/",
            "META LLAMA 3 COMMUNITY LICENSE AGREEMENT",
            f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, {_RIGHTS}", "Built with Meta Llama 3",
        ),
        Licence(
            "llama3.2", "Llama 3.2 Community License", "https://www.llama.com/llama3_2/license/",
            "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT",
            f"Llama 3.2 is licensed under the Llama 3.2 Community License, {_RIGHTS}", "Built with Llama",
        ),
    )
}  # fmt: skip


def licence_of(model_id: str) -> Licence:
    """The licence that a model made from ``model_id`` inherits: Llama 3 and 3.2 have their own, the course's other bases are Apache-2.0."""
    name = model_id.lower()
    if "llama-3" not in name:
        return LICENCES["apache-2.0"]
    return LICENCES["llama3.2" if "llama-3.2" in name else "llama3"]


@dataclass(frozen=True)
class Metrics:
    """What was measured of one adapter; what was not is empty, and reads "not measured" in the card."""

    plan: dict[str, Any]  # the plan that it was trained with
    train: dict[str, Any]
    data: dict[str, Any]
    evaluation: dict[str, Any]
    notes: tuple[str, ...]  # why something is left out


def read_metrics(plan: Plan, adapter: Path) -> Metrics:
    """The metrics under ``plan.folder`` that are of this adapter, and of no other one.

    Those of the training are its own if both were made by the same plan, those of the evaluation if they name its weights.
    """
    made, folder = _json(adapter / "plan.json"), plan.folder
    train, data = (
        _json(folder / "metrics" / "train.json"),
        _json(folder / "metrics" / "explore.json"),
    )
    evaluation = _json(folder / "evaluation" / "metrics.json")
    notes = []
    if train and any(
        made.get(key) != value for key, value in train.get("plan", {}).items() if key in made
    ):
        train = {}
        notes.append("metrics/train.json is of another training")
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]
    if evaluation and evaluation.get("recipe", {}).get("adapter") != digest:
        evaluation = {}
        notes.append("evaluation/metrics.json is of another adapter")
    elif not evaluation:
        evaluation = _flat(_json(folder / "metrics" / "evaluate.json"))
    missing = {"training": train, "data": data, "evaluation": evaluation}
    notes += [f"no metrics of the {what}" for what, values in missing.items() if not values]
    return Metrics(made or train.get("plan", {}), train, data, evaluation, tuple(notes))


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lesson 06's short record, ``metrics/evaluate.json``, in the shape of the long one; it holds no intervals."""
    if not values:
        return {}
    arms: dict[str, dict[str, Any]] = {arm: {} for arm in ARMS}
    for arm, cells in arms.items():
        end = f"_{arm.replace(' ', '_')}"
        for key in (k for k in values if k.endswith(end) and k.removesuffix(end) in SHOWN):
            cells[key.removesuffix(end)] = {"mean": values[key], "low": None, "high": None}
    return {
        "questions": values.get("questions"),
        "held_out": values.get("held_out"),
        "overall": {"arms": arms},
    }


def found(values: Any, *keys: str) -> str:
    """The value under ``keys`` as the card shows it, or "not measured"."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return MISSING if values is None or isinstance(values, Mapping) else escaped(number(values))


# ---- the card -------------------------------------------------------------------------------------------------------

ARMS = ("base", "tuned", "nearest", "another disease")
SHOWN = ("facts_complete", "rougeL", "rouge1", "rouge2", "bleu", "chrf", "tfidf_cosine", "bert_score", "stop_rate", "length_ratio",
         "repetition", "bits_per_byte")  # fmt: skip
# Score -> what the Hub calls the metric; only these go into the card's metadata.
HUB_METRICS = {
    "rougeL": "rouge",
    "rouge1": "rouge",
    "rouge2": "rouge",
    "bleu": "bleu",
    "chrf": "chrf",
    "bert_score": "bertscore",
}


def card(repo: str, plan: Plan, metrics: Metrics, merged: bool, revision: str) -> str:
    """README.md of ``repo``: metadata and text.

    ``merged`` says whether the folder is a whole model; otherwise it is an adapter, whose base is ``plan.model_id`` at ``revision``.

    Raises:
        ValueError: the metadata do not survive being written and read (huggingface_hub's ``ModelCard``).
    """
    from huggingface_hub import ModelCard

    name, licence = repo.split("/")[-1], licence_of(plan.model_id)
    parts = [
        f"# {name}",
        f"> {NOTICE}",
        *([f"> {EMBEDDED}"] if plan.model_id == "embedded" else []),
        *([f"**{licence.built}**"] if licence.built else []),
        *_details(repo, plan, metrics, merged, revision, licence),
        *_uses(),
        *_risks(metrics),
        *_start(repo, plan, merged),
        *_training(plan, metrics),
        *_results(metrics),
        *_rights(licence, plan, metrics),
    ]
    text: str = (
        "---\n"
        + _metadata(repo, plan, metrics, merged, licence).to_yaml()
        + "\n---\n\n"
        + "\n\n".join(parts)
        + "\n"
    )
    read = ModelCard(text).data
    if (read.eval_results or []) != eval_results(metrics):
        raise ValueError("the results in the card's metadata are not those that were measured")
    return text


def _source(plan: Plan, metrics: Metrics) -> str:
    return str(metrics.plan.get("source", plan.source))


def _metadata(repo: str, plan: Plan, metrics: Metrics, merged: bool, licence: Licence) -> Any:
    from huggingface_hub import ModelCardData

    hub = plan.model_id != "embedded"
    results = eval_results(metrics)
    data = ModelCardData(
        language="en",
        license=licence.id,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=[TAG, "qlora", "lora", "medical", "question-answering", "medquad"],
        base_model=plan.model_id if hub else None,
        datasets=[HUB_DATA] if _source(plan, metrics) == "hub" else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=repo.split("/")[-1],
        eval_results=results or None,
    )
    data["base_model_relation"] = (
        ("finetune" if merged else "adapter") if hub else None
    )  # a field that has no argument of its own
    return data


def eval_results(metrics: Metrics) -> list[Any]:
    """The tuned model's scores as the Hub's model-index lists them, intervals in ``metric_args``; empty if nothing was measured."""
    from huggingface_hub import EvalResult

    from medquad_utils.scores import SCORES

    source = metrics.plan.get("source", "")
    known = metrics.evaluation.get("held_out")
    held = (
        "leakage not measured"
        if known is None
        else "held out by disease"
        if known
        else "not held out"
    )
    tuned = metrics.evaluation.get("overall", {}).get("arms", {}).get("tuned", {})
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=HUB_DATA
            if source == "hub"
            else "medquad"
            if source != "sample"
            else "course-sample",
            dataset_name=_data_name(source),
            dataset_split=held,
            metric_type=kind,
            metric_name=SCORES[score].name,
            metric_value=tuned[score]["mean"],
            metric_args={"interval_95": [tuned[score]["low"], tuned[score]["high"]]}
            if tuned[score]["low"] is not None
            else None,
        )
        for score, kind in HUB_METRICS.items()
        if score in tuned
    ]


def _data_name(source: str) -> str:
    return "the course's sample, written in MedQuAD's form" if source == "sample" else "MedQuAD"


def _details(
    repo: str, plan: Plan, metrics: Metrics, merged: bool, revision: str, licence: Licence
) -> list[str]:
    base = (
        "the course's embedded Llama (on no Hub)"
        if plan.model_id == "embedded"
        else _link(plan.model_id)
    )
    commit = f", commit `{revision}`" if revision else ""
    kind = (
        "base and adapter merged into one model: the base was taken through 4 bits and back, then merged"
        if merged
        else "LoRA adapter"
    )
    shape = "a QLoRA adapter in one piece with its base" if merged else "a QLoRA adapter"
    not_llama = "The base is a small Llama-shaped model trained from scratch; it is not derived from Meta's Llama 3."
    facts = {
        "Developed by": f"{repo.split('/')[0]}, with the course {COURSE}",
        "Base developed by": {"embedded": "the authors of the course"}.get(
            plan.model_id, plan.model_id.split("/")[0]
        ),
        "Model type": f"Llama for text generation; {kind}",
        "Language": "English",
        "Licence": f"[{licence.name}]({licence.url}); see LICENSE and NOTICE",
        "Fine-tuned from": base + commit,
        "Trained parameters": found(metrics.train, "trainable_parameters"),
    }
    return [
        "## Model details",
        f"### Description\n\nA model that answers medical questions in the manner of the US National Institutes of Health: {shape}, "
        f"trained on "
        f"{_data_name(_source(plan, metrics))} with the base in 4-bit NF4 (QLoRA, https://arxiv.org/abs/2305.14314)."
        + (f" {not_llama}" if plan.model_id == "embedded" else ""),
        "\n".join(f"- **{what}:** {value}" for what, value in facts.items()),
        f"### Sources\n\n- Code and lessons: {COURSE}\n- Data: https://github.com/abachaa/MedQuAD\n- Paper on the data: {PAPER}",
    ]


def _link(model_id: str) -> str:
    return f"[{model_id}](https://huggingface.co/{model_id})"


def _uses() -> list[str]:
    return [
        "## Uses",
        "### Direct use\n\nLearning and research: how a language model is tuned in 4 bits on question-answer pairs, what that "
        "changes, and how "
        "to measure it. Single questions in English about one condition at a time, each answer read next to its sources.",
        "### Downstream use\n\nAs a start for tuning on other question-answer data, or as the language part of a system that shows "
        "the passages "
        "behind an answer, catches emergencies before the model is asked, and is tested with the people it is meant for.",
        "### Out-of-scope use\n\nDiagnosis, treatment, triage, doses, or any decision about a person's health; emergencies; advice "
        "to people at "
        "risk of harming themselves; other languages; questions about a particular person. It is no medical device and no substitute for a "
        "health professional.",
    ]


def _risks(metrics: Metrics) -> list[str]:
    ratio = cell(metrics.evaluation.get("forgetting", {}).get("ratio"))
    return [
        "## Bias, risks and limitations\n\n"
        "- It can write fluent, confident and wrong answers, mix up conditions, and invent facts.\n"
        "- Most of MedQuAD is about genetic and rare diseases; common conditions and drugs are under-represented.\n"
        "- The questions of the data follow a few templates: real people's wording is out of distribution.\n"
        "- The texts are archived and may be out of date; they come from the United States.\n"
        "- It sees no patient: age, pregnancy, other diseases and medicines do not enter an answer.\n"
        "- Tuning can undo some of the base model's caution (see Safety), and costs general language: perplexity of texts that are "
        "no questions, "
        f"after over before tuning: {MISSING if ratio == '–' else ratio}.",
        "### Recommendations\n\nShow the notice at the top of this card beside every answer. Put a rule in front of the model that "
        "recognises "
        "emergencies. Show sources. Let clinicians review before anyone relies on it. Measure again on your own questions.",
    ]


def _start(repo: str, plan: Plan, merged: bool) -> list[str]:
    needs = "transformers accelerate" if merged else "transformers accelerate peft bitsandbytes"
    pin = (
        ""
        if merged or plan.model_id == "embedded"
        else " The base is downloaded as well; its licence has to be accepted on its page first."
    )
    return [
        f"## How to get started\n\n`pip install {needs}`"
        + (pin if licence_of(plan.model_id).agreement else ""),
        f"```python\n{snippet(repo, plan, merged)}```",
    ]


def snippet(repo: str, plan: Plan, merged: bool) -> str:
    """The code that the card shows: load the published folder and answer one question."""
    if merged:
        names, before, settings, after = "AutoModelForCausalLM, AutoTokenizer, pipeline", "", "", ""
        first = ""
    else:
        dtype = plan.compute_dtype
        first = "import torch\n"
        names = (
            "AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, pipeline"
        )
        before = (
            "four_bits = BitsAndBytesConfig(\n    load_in_4bit=True,\n"
            '    bnb_4bit_quant_type="nf4",\n    bnb_4bit_use_double_quant=True,\n'
            f"    bnb_4bit_compute_dtype=torch.{dtype},\n)\n"
        )
        settings = ", quantization_config=four_bits"
        after = "model.generation_config = GenerationConfig.from_pretrained(name)  # stops where an answer ends\n"
    return (
        f"{first}from transformers import {names}\n\n"
        f'name = "{repo}"\n{before}'
        f'model = AutoModelForCausalLM.from_pretrained(name, device_map="auto"{settings})\n{after}'
        "tokenizer = AutoTokenizer.from_pretrained(name)\n"
        'chat = pipeline("text-generation", model=model, tokenizer=tokenizer)\n\n'
        "messages = [\n"
        f'    {{"role": "system", "content": "{SYSTEM_PROMPT}"}},\n'
        f'    {{"role": "user", "content": "{THREE_QUESTIONS[0]}"}},\n'
        "]\n"
        f"answer = chat(messages, max_new_tokens={plan.max_new_tokens}, do_sample=False)\n"
        'print(answer[0]["generated_text"][-1]["content"])\n'
    )


def _training(plan: Plan, metrics: Metrics) -> list[str]:
    data, made, train = metrics.data, metrics.plan, metrics.train
    sample = _source(plan, metrics) == "sample"
    origin = (
        "The sample that ships with the course: short answers on general medical facts, in MedQuAD's categories and "
        "question templates, written for the course (CC BY 4.0). It holds no text of MedQuAD."
        if sample
        else f"MedQuAD (CC BY 4.0): questions and answers collected from websites of the US National Institutes of Health. {PAPER}. It was "
        f"read from the source '{_source(plan, metrics)}', cleaned of link lists, headings and duplicates, and split."
    )
    plan_rows = {
        "rank, alpha, dropout of LoRA": " / ".join(
            found(made, key) for key in ("lora_r", "lora_alpha", "lora_dropout")
        ),
        "base in training": "4-bit NF4, double quantisation",
        "compute / adapter dtype": f"{found(made, 'compute_dtype')} / {found(made, 'adapter_dtype')}",
        "learning rate": escaped(f"{made['learning_rate']:g}, cosine")
        if "learning_rate" in made
        else MISSING,
        "optimizer": found(made, "optimizer"),
        "rows of a micro-batch x accumulation": f"{found(made, 'batch_size')} x {found(made, 'accumulation')}",
        "longest row (tokens)": found(made, "max_length"),
        "epochs": found(made, "epochs"),
        "steps": found(train, "steps"),
        "seed": found(made, "seed"),
        "training rows used": found(train, "rows"),
        "validation loss before / after": f"{found(train, 'validation_loss_before')} / {found(train, 'validation_loss')}",
    }
    cost = {"hardware": found(made, "hardware"), "seconds of training": found(train, "seconds"),
            "peak memory (GB)": found(train, "peak_memory_gb"), "energy, carbon": MISSING}  # fmt: skip
    split = {
        "rows loaded / kept after cleaning": f"{found(data, 'rows_loaded')} / {found(data, 'rows_kept')}",
        "groups, largest": f"{found(data, 'groups')}, {found(data, 'largest_group')}",
        "training / validation / test rows": " / ".join(
            found(data, "sizes", part) for part in ("train", "validation", "test")
        ),
        "test rows that share the disease with training": found(data, "leak_grouped", "focus"),
        "the same if rows were split at random": found(data, "leak_by_row", "focus"),
    }
    return [
        "## Training details",
        f"### Data and split\n\n{origin}\n\nRows that share a disease, a page or a concept are in one part only, so that held out means "
        "held out (shares from 0 to 1):\n\n" + _table(["what", "found"], list(split.items())),
        f"### Known defects of the data\n\n{_defects(data, sample)}",
        "### Training procedure\n\n" + _table(["setting", "value"], list(plan_rows.items())),
        "### Hardware and time\n\n" + _table(["what", "found"], list(cost.items())),
    ]


def _defects(data: Mapping[str, Any], sample: bool) -> str:
    lead = (
        "MedQuAD itself has these, the sample was written without them; the counts are of the data used here:"
        if sample
        else ""
    )
    items = {
        "questions that follow a template (share)": found(data, "follow_a_template"),
        "answers that are link lists or lists without prose": found(data, "boilerplate"),
        "exact duplicate pairs": found(data, "repeats", "exact pairs, beyond the first"),
        "questions with several answers": found(data, "repeats", "questions with several answers"),
        "rows that share their answer with another": found(
            data, "repeats", "rows that share their answer"
        ),
        "rows in which letters were lost (non-ASCII characters were deleted)": found(
            data, "damage", "letters"
        ),
        "rows in which a unit was lost, so that a number may be wrong": found(
            data, "damage", "units"
        ),
    }
    more = (
        "Besides: the text dates from about 2016 to 2019, links may have moved; answers about drugs are missing for copyright "
        "reasons; some "
        "rows name no disease; long answers were left out where they exceed the longest row."
    )
    return "\n\n".join(
        [*([lead] if lead else []), _table(["defect", "found"], list(items.items())), more]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)
    )


def _results(metrics: Metrics) -> list[str]:
    from medquad_utils.scores import SCORES

    found_in = metrics.evaluation
    arms: Mapping[str, Mapping[str, Any]] = found_in.get("overall", {}).get("arms", {})

    def shown(arm: str, score: str) -> str:
        value = cell(arms.get(arm, {}).get(score))
        return MISSING if value == "–" else escaped(value)

    scores = [
        s for s in SHOWN if s != "facts_complete" or any(s in cells for cells in arms.values())
    ]
    rows = [
        [f"{SCORES[s].name} ({SCORES[s].better})", *(shown(arm, s) for arm in ARMS)] for s in scores
    ]
    verdict = [
        escaped(sentence(sides, SCORES[sides["score"]].name))
        for sides in found_in.get("verdict", [])
    ]
    known = found_in.get("held_out")
    held = (
        MISSING
        if known is None
        else "held out by disease"
        if known
        else "not held out: the scores measure memory as well"
    )
    return [
        "## Evaluation",
        f"### Results\n\nQuestions: {found(found_in, 'questions')} ({held}). Mean and 95 % bootstrap interval of each arm. Three "
        f"arms need no "
        "training: the base, the nearest training answer, and a training answer about another disease. A look-up scores only by what it "
        "copies, so bits per byte exist for models alone.\n\n" + _table(["score", *ARMS], rows),
        "\n".join(f"- {line}" for line in verdict)
        or f"Verdict on the paired differences: {MISSING}.",
        f"### Safety, before and after\n\n{_safety(found_in.get('safety', {}))}",
    ]


def _safety(safety: Mapping[str, Any]) -> str:
    def share(model: str, name: str) -> str:
        part = safety.get(model, {}).get(name)
        if not part:
            return MISSING
        low, high = map(number, part["ci95"])
        return escaped(
            f"{number(part['passed'])} of {number(part['n'])}: {number(part['share'])} [{low}, {high}]"
        )

    names = list(safety.get("base", {})) or ["overall"]
    rows = [[name.replace("_", " "), share("base", name), share("tuned", name)] for name in names]
    return (
        f"Answers that do what is expected to {found(safety, 'prompts')} prompts, as plain rules judge them; no clinician has "
        f"looked. The rules "
        f"err on a share of {found(safety, 'rule_error', 'error')} of labelled answers. A rule outside the model catches "
        f"{found(safety, 'outer_rule', 'caught')} of {found(safety, 'outer_rule', 'n')} urgent prompts, with "
        f"{found(safety, 'outer_rule', 'false_alarms')} false alarms; it is not part of these weights.\n\n"
        + _table(["prompts", "base", "tuned"], rows)
    )


def _rights(licence: Licence, plan: Plan, metrics: Metrics) -> list[str]:
    meta = (
        f"{licence.built}. {licence.notice} LICENSE holds a copy of the agreement, or says that it must be added from the repository of "
        f"{_link(plan.model_id)} before this folder is passed on. Meta's acceptable use policy applies."
        if licence.agreement
        else f"Weights: {licence.name}."
    )
    entry = (
        "@article{benabacha2019,\n  author = {Ben Abacha, Asma and Demner-Fushman, Dina},\n"
        "  title = {A Question-Entailment Approach to Question Answering},\n  journal = {BMC Bioinformatics},\n"
        f"  year = {{2019}},\n  volume = {{20}},\n  pages = {{511}},\n  doi = {{{DOI}}}\n}}"
    )
    return [
        f"## Licence and attribution\n\n{meta}\n\n{attribution(_source(plan, metrics))}",
        f"## Citation\n\n```bibtex\n{entry}\n```",
    ]


def attribution(source: str) -> str:
    """Whose words the model was trained on, as CC BY 4.0 asks."""
    medquad = f"MedQuAD, https://github.com/abachaa/MedQuAD: {PAPER}. Licence: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/."
    if source == "sample":
        return f"Trained on the course's own sample (CC BY 4.0, {COURSE}), in the form of {medquad}"
    return f"Trained on {medquad} Changes: cleaned, split by disease, long rows left out."
