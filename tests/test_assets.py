"""The embedded sample, the embedded model, and that they belong together."""

from __future__ import annotations

import json
import random
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import build_sample
import build_tiny as build
import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from medquad_utils import data, evaluation, splits
from medquad_utils.assets import sample
from medquad_utils.chat import end_ids
from medquad_utils.cleaning import RULES, clean
from medquad_utils.generation import ask
from medquad_utils.profiles import PROFILES, TINY_MODEL, Shape
from medquad_utils.scores import facts_column
from medquad_utils.splits import normalise, template_of

ALL, ROWS = sample.conditions(), build_sample.rows()
SHIPPED = json.loads((TINY_MODEL / build.MANIFEST).read_text())
CONFIG = LlamaConfig.from_pretrained(TINY_MODEL)


def test_a_name_stands_for_one_condition_and_every_field_is_read() -> None:
    names = Counter(normalise(name) for c in ALL for name in {c.name, *c.synonyms})
    assert len(ALL) >= 100 and [name for name, count in names.items() if count > 1] == []
    entries = tomllib.loads(sample.CONDITIONS.read_text(encoding="utf-8"))["condition"]
    assert set().union(*entries) <= set(sample.Condition.__dataclass_fields__)


def test_rows_have_medquads_templates_and_survive_cleaning() -> None:
    assert len({(r["question"], r["answer"]) for r in ROWS}) == len(ROWS)
    for row in ROWS:
        found = template_of(row["question"])
        assert found and normalise(found[1]) == normalise(row["focus"]), row["question"]
    assert clean(ROWS)[0] == ROWS


def test_an_answer_holds_all_facts_of_its_own_condition_only() -> None:
    answers = {(r["qtype"], r["focus"]): r["answer"] for r in ROWS}
    other = [next(a for (q, f), a in answers.items() if q == t and f != g) for t, g in answers]
    assert facts_column([*answers.values()], ROWS).all()
    assert facts_column(other, ROWS).mean() < 0.01
    assert facts_column([a[: len(a) // 2] for a in answers.values()], ROWS).mean() < 0.01


def test_facts_are_found_by_synonym_and_for_the_types_of_the_sample_only() -> None:
    assert sample.facts_of("Hypertension", "prevention")[0] == "cutting down on salt"
    assert sample.facts_of("Hypertension", "frequency") == sample.facts_of("", "causes") == []


@pytest.fixture(scope="module")
def loaded() -> data.Loaded:
    """The raw sample, as lesson 01 reads it."""
    return data.load(tiny(Path()))


def test_everything_is_planted_and_the_truth_belongs_to_the_rows(loaded: data.Loaded) -> None:
    plants = tomllib.loads(build_sample.WORDING.read_text(encoding="utf-8"))["plant"]
    planted: Counter[str] = Counter()
    for plant in plants:
        planted[plant.get("defect", "")] += plant.get("count", 1) if plant["text"] else 0
    truth = build_sample.truth()
    assert Counter(t.defect for t in truth if t.defect) == +planted - Counter({"": planted[""]})
    assert len(loaded.skipped["no answer"]) == sum(p["count"] for p in plants if not p["text"])
    assert [line.split(" (")[0] for line in loaded.skipped["broken XML"]] == [
        "handbook/broken-1.xml", "leaflets/broken-2.xml", "registry/broken-3.xml",
    ]  # fmt: skip
    names = {c.name: {c.mention, *c.synonyms} for c in ALL}
    for row, about in zip(loaded.rows, truth, strict=True):
        assert row["focus"] in {about.condition, None} | names[about.condition]
    lost = [row for row in loaded.rows if row["focus"] is None]
    kinds = {template_of(row["question"]) is None for row in lost}
    assert (len(lost), kinds) == (8, {True, False})
    # Written for the course: no row may pass for a text of an institute.
    assert all(str(row["source"]).startswith(sample.SOURCE) for row in loaded.rows)


def test_the_shipped_sample_is_what_its_tool_writes(tmp_path: Path) -> None:
    """Byte by byte: sets have another order in each process."""
    build_sample.build(tmp_path)
    written, shipped = (
        {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
        for folder in (tmp_path, data.SAMPLE)
    )
    assert written == shipped, "run python tests/build_sample.py"
    assert len(shipped) > 200


def test_cleaning_gives_the_clean_rows_back(loaded: data.Loaded) -> None:
    kept, effects = clean(loaded.rows)
    assert all(effect.changed + effect.dropped for effect in effects.values())
    restored = {(r["question"], r["answer"]) for r in kept}
    assert sum((r["question"], r["answer"]) in restored for r in ROWS) >= 0.95 * len(ROWS)
    assert clean(kept)[0] == kept


def test_each_rule_finds_most_of_its_defects_and_none_is_perfect(loaded: data.Loaded) -> None:
    fired: dict[str, set[int]] = {rule.name: set() for rule in RULES}
    for number, row in enumerate(loaded.rows):
        answer = row["answer"]
        for rule in RULES:
            before, answer = answer, rule.apply(answer)
            fired[rule.name] |= {number} if answer != before else set()
    defects = json.loads((data.SAMPLE / build_sample.TRUTH).read_text())["planted"]
    for name, found in fired.items():
        planted = set(defects[name])
        precision, recall = (len(found & planted) / len(of) for of in (found, planted))
        assert 0.6 < precision <= 1 and 0.6 < recall < 1, name


def test_a_split_by_row_of_the_sample_buys_the_look_up_a_score(loaded: data.Loaded) -> None:
    """Questions repeat, as in MedQuAD, and two second spellings are joined by nothing."""
    kept, _ = clean(loaded.rows)
    numbers = splits.groups(kept)
    group = {(r["question"], r["answer"]): n for r, n in zip(kept, numbers, strict=True)}
    split = splits.split_by_row(kept)
    asked = splits.draw(split.test, 100, 0)
    held = {group[r["question"], r["answer"]] for r in asked}
    honest = [r for r in split.train if group[r["question"], r["answer"]] not in held]
    answers = [evaluation.nearest_training_answers(rows, asked) for rows in (split.train, honest)]
    leak, fair = (evaluation.rouge_l(texts, [r["answer"] for r in asked]) for texts in answers)
    assert evaluation.interval(leak - fair)[1] > 0.01
    assert 0.1 < splits.leakage(split.train, split.test)["normalised question"] < 0.3
    pairs = zip(loaded.rows, build_sample.truth(), strict=True)
    about = {row["document_id"]: known.condition for row, known in pairs}
    spread = {(about[r["document_id"]], n) for r, n in zip(kept, numbers, strict=True)}
    assert len(ALL) + 2 <= len(spread) <= len(ALL) + 10, "two spellings, and rows without focus"


def test_the_base_is_never_shown_a_question_or_an_answer() -> None:
    rng = random.Random(1)
    texts = [text for c in ALL for qtype in c.facts for text in build_sample.statements(c, qtype)]
    texts += [sample.article(c, 4, rng, beside=rng.choice(ALL)) for c in ALL]
    texts += [sample.article(c, aspects, rng) for c in ALL for aspects in (1, 3, 9)]
    everything = "\n".join(texts)
    assert not any(mark in everything for mark in ("?", "<|", "|>"))
    assert not {"user", "assistant", "system:"} & set(everything.lower().split())
    assert [r["answer"] for r in ROWS if r["answer"] in everything] == []


def test_the_manifest_ties_weights_tokenizer_and_facts_together(tmp_path: Path) -> None:
    for path in TINY_MODEL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    build.write_manifest(tmp_path)
    fresh = json.loads((tmp_path / build.MANIFEST).read_text())
    assert fresh == {k: SHIPPED[k] for k in ("files", "made_from")}, "a source changed: remake it"
    assert len(fresh["files"]) == 5 and len(fresh["made_from"]) == 2


def test_the_model_is_a_small_llama_with_llama_3s_parts() -> None:
    assert CONFIG.rope_parameters == {"rope_type": "default", "rope_theta": 500_000.0}
    assert 1 <= CONFIG.num_key_value_heads < CONFIG.num_attention_heads, "grouped-query attention"
    shape, weights = Shape.of(CONFIG), load_file(TINY_MODEL / "model.safetensors")
    assert shape.linears() == PROFILES["tiny"].shape.linears()
    assert all(i % 64 == i * o % 64 == 0 for i, o in shape.linears().values()), "blocks of NF4"
    count = sum(w.numel() for w in weights.values())
    assert 1e6 <= count == shape.parameters == SHIPPED["parameters"] <= 4e6
    _, report = LlamaForCausalLM.from_pretrained(TINY_MODEL, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_special_tokens_are_llama_3s_with_a_pad_of_its_own(tiny_tokenizer: Any) -> None:
    tokens = (tiny_tokenizer.bos_token, tiny_tokenizer.eos_token, tiny_tokenizer.pad_token)
    assert tokens == ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>")
    ends, generation = end_ids(tiny_tokenizer), GenerationConfig.from_pretrained(TINY_MODEL)
    assert sorted(generation.eos_token_id) == sorted(ends) and len(ends) == 2
    assert generation.pad_token_id == tiny_tokenizer.pad_token_id == CONFIG.pad_token_id
    assert CONFIG.pad_token_id not in ends and len(tiny_tokenizer) == CONFIG.vocab_size


@given(st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tiny_tokenizer: Any, text: str) -> None:
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "<|" in text or tiny_tokenizer.decode(ids) == text
    assert tiny_tokenizer(text)["input_ids"] == [tiny_tokenizer.bos_token_id, *ids]


@pytest.mark.full  # trains a tokenizer
def test_building_the_tokenizer_again_gives_the_shipped_one() -> None:
    shipped = json.loads((TINY_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    rebuilt = json.loads(build.build_tokenizer().backend_tokenizer.to_str())
    assert {key for key in shipped if rebuilt[key] != shipped[key]} <= {"padding"}


@pytest.mark.full  # trains two models for two steps
def test_two_builds_with_one_seed_are_identical(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sample, "conditions", lambda: ALL[:10])  # a build takes seconds
    first, again = tmp_path / "first", tmp_path / "again"
    for folder in (first, again):
        build.build(folder, steps=2, seed=0)
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_recipe_builds_what_is_shipped_and_the_seed_decides() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    models = [build.build_model(tokenizer, seed) for seed in (0, 0, 1)]
    made, shipped = models[0].config.to_dict(), CONFIG.to_dict()
    differs = {key for key in made if made[key] != shipped.get(key)}
    assert differs <= {"_name_or_path", "transformers_version", "dtype", "architectures"}
    a, b, c = (model.model.layers[0].mlp.up_proj.weight for model in models)
    assert torch.equal(a, b) and not torch.equal(a, c)
    first, again, other = (next(build.batches(tokenizer, 4, seed)) for seed in (0, 0, 1))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"][:, :9], other["input_ids"][:, :9])
    ids, labels, mask = first["input_ids"], first["labels"], first["attention_mask"].bool()
    assert torch.equal(labels[mask], ids[mask]) and set(labels[~mask].tolist()) <= {-100}


@pytest.mark.full  # writes 50 answers
def test_the_base_states_facts_and_answers_no_question() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    base = LlamaForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()
    wanted = [sample.phrase("symptoms", c.facts["symptoms"]) for c in ALL[::6]]
    stated = [build_sample.statements(c, "symptoms")[0] for c in ALL[::6]]
    openings = [text.split(facts)[0].rstrip() for text, facts in zip(stated, wanted, strict=True)]
    batch = tokenizer(openings, return_tensors="pt", padding=True, padding_side="left")
    out = base.generate(**batch, max_new_tokens=40, do_sample=False)
    said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])
    right = [text.strip().startswith(facts) for text, facts in zip(said, wanted, strict=True)]
    assert sum(right) / len(right) > 0.6
    rows = [r for r in ROWS if r["qtype"] == "symptoms"][::6]
    answers = ask(base, tokenizer, [r["question"] for r in rows], max_new_tokens=40)
    assert facts_column([a.text for a in answers], rows).mean() < 0.2
    assert sum(a.stopped for a in answers) / len(rows) < 0.5
