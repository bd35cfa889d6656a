"""The embedded sample, the embedded model, and that they belong together."""

from __future__ import annotations

import contextlib
import io
import json
import random
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from medquad_utils.assets import build, sample
from medquad_utils.assets.sample import CONDITIONS, QUESTIONS, STATEMENTS, Condition, conditions
from medquad_utils.chat import end_ids
from medquad_utils.data import clean, normalise, template_of
from medquad_utils.evaluation import facts_complete
from medquad_utils.generation import ask
from medquad_utils.profiles import PROFILES, TINY_MODEL, Shape

ALL = conditions()
LISTS = ("symptoms", "causes", "treatment", "prevention", "exams and tests", "susceptibility")
SEMANTIC_TYPES = {"T047", "T191", "T048", "T037", "T184", "T019", "T046"}  # UMLS: diseases, neoplasms, disorders, injuries, ...

# ---- the facts ------------------------------------------------------------------------------------------------------


def test_there_are_many_conditions_and_no_name_twice() -> None:
    assert len(ALL) >= 100
    names = Counter(normalise(name) for c in ALL for name in {c.name, *c.synonyms})
    assert [name for name, count in names.items() if count > 1] == [], "a name or synonym that stands for two conditions"


def test_the_file_holds_no_field_that_is_not_read() -> None:
    known = {"name", "mention", "plural", "synonyms", "specialty", "semantic_type", "facts"}
    entries = tomllib.loads(CONDITIONS.read_text(encoding="utf-8"))["condition"]
    assert [(e["name"], set(e) - known) for e in entries if set(e) - known] == []
    assert [e["name"] for e in entries] == [c.name for c in ALL]


@pytest.mark.parametrize("c", ALL, ids=[c.name for c in ALL])
def test_a_condition_follows_the_form(c: Condition) -> None:
    assert c.name.lower() == c.mention.lower(), "the mention is the name but for capitals"
    assert c.name.isascii() and not set("()?,;.") & set(c.name), c.name
    assert c.semantic_type in SEMANTIC_TYPES
    assert c.specialty
    assert len(c.synonyms) <= 3
    assert {"information", "symptoms", "causes", "treatment"} <= set(c.facts) <= set(QUESTIONS)
    assert 6 <= len(c.facts) <= 9
    for qtype, facts in c.facts.items():
        fewest, most = {"information": (2, 2), "outlook": (1, 2), "inheritance": (1, 2)}.get(qtype, (2, 4))
        assert fewest <= len(facts) <= most, qtype
        assert len(set(facts)) == len(facts), qtype
        for fact in facts:
            assert fact and fact == " ".join(fact.split()), fact
            assert fact.isascii() and not set(",;?<>|{}") & set(fact) and not fact.endswith("."), fact
            assert len(fact.split()) <= (7 if qtype in LISTS else 12), fact
            assert qtype == "information" or c.mention.lower() not in fact.lower(), f"repeats the name: {fact}"


def test_no_two_conditions_share_a_list_of_facts() -> None:
    lists = Counter((qtype, tuple(sorted(facts))) for c in ALL for qtype, facts in c.facts.items() if len(facts) > 1)
    assert [facts for facts, count in lists.items() if count > 1] == []


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_rows_have_medquads_templates_and_one_row_an_aspect() -> None:
    rows = sample.rows()
    assert len(rows) == sum(len(c.facts) for c in ALL)
    assert len({(r["question"], r["answer"]) for r in rows}) == len(rows)
    for r in rows:
        found = template_of(str(r["question"]))
        assert found, r["question"]
        assert normalise(found[1]) == normalise(str(r["focus"]))


def test_cleaning_keeps_every_row_of_the_sample() -> None:
    rows = sample.rows()
    assert clean(rows)[0] == rows


def test_every_reference_answer_holds_all_its_facts_and_no_other_conditions_answer_does() -> None:
    rows = sample.rows()
    answers = [str(r["answer"]) for r in rows]
    complete = facts_complete(answers, rows)
    assert len(complete) == len(rows)
    assert [a for a, whole in zip(answers, complete, strict=True) if not whole] == []
    other = [next(q["answer"] for q in rows if q["qtype"] == r["qtype"] and q["focus"] != r["focus"]) for r in rows]
    assert facts_complete([str(a) for a in other], rows).mean() < 0.01
    cut = [a[: len(a) // 2] for a in answers]
    assert facts_complete(cut, rows).mean() < 0.01


def test_facts_are_found_by_focus_in_any_case_and_none_for_the_unknown() -> None:
    for c in ALL:
        assert sample.facts_of(c.name.upper(), "symptoms") == c.facts["symptoms"]
    assert sample.facts_of(ALL[0].name, "research") == sample.facts_of("no such disease", "symptoms") == []


def test_facts_are_joined_as_english_joins_them() -> None:
    assert sample.phrase("symptoms", ["a"]) == "a"
    assert sample.phrase("symptoms", ["a", "b"]) == "a and b"
    assert sample.phrase("symptoms", ["a", "b", "c"]) == "a, b and c"
    assert sample.phrase("outlook", ["a", "b"]) == "a, and b"
    assert sample.phrase("information", ["a tumor", "of the skin"]) == "a tumor of the skin"


# ---- statements -----------------------------------------------------------------------------------------------------


def pretraining_texts() -> list[str]:
    """Every statement, and articles of every length and kind about every condition."""
    rng = random.Random(1)
    texts = [text for c in ALL for qtype in c.facts for text in sample.statements(c, qtype)]
    pairs = [sample.article(c, 4, rng, beside=rng.choice(ALL)) for c in ALL]
    return texts + pairs + [sample.article(c, aspects, rng) for c in ALL for aspects in (1, 3, 9)]


def test_the_base_is_never_shown_a_question_or_a_chat() -> None:
    questions = {normalise(str(r["question"])) for r in sample.rows()}
    for text in pretraining_texts():
        assert "?" not in text
        assert "<|" not in text and "|>" not in text
        assert normalise(text) not in questions
        assert not {"user", "assistant", "system:"} & set(text.lower().split()), text
    assert len(questions) == len(sample.rows())
    everything = "\n".join(pretraining_texts())
    assert [r["answer"] for r in sample.rows() if str(r["answer"]) in everything] == [], "no answer either, only other wordings"


@given(st.sampled_from(ALL), st.integers(1, 9), st.randoms(use_true_random=False))
def test_an_article_names_its_condition_in_every_sentence(c: Condition, aspects: int, rng: random.Random) -> None:
    text = sample.article(c, aspects, rng)
    title, _, body = text.rpartition("\n")
    assert title in ("", c.name)
    assert body.lower().count(c.mention.lower()) >= min(aspects, len(c.facts))
    assert body.endswith(".")
    told = [qtype for qtype, facts in c.facts.items() if all(fact in body for fact in facts)]
    assert len(told) >= min(aspects, len(c.facts))


def test_every_statement_tells_all_its_facts_and_the_name() -> None:
    assert all(len(set(templates)) == len(templates) >= 4 for templates in STATEMENTS.values())
    assert set(STATEMENTS) == set(QUESTIONS) == set(sample.ANSWERS)
    for c in ALL:
        for qtype, facts in c.facts.items():
            texts = sample.statements(c, qtype)
            assert len(texts) == len(STATEMENTS[qtype])
            assert all(c.mention.lower() in text.lower() and all(fact in text for fact in facts) for text in texts)


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_MODEL)


def test_the_manifest_ties_weights_tokenizer_and_facts_together() -> None:
    manifest = json.loads((TINY_MODEL / build.MANIFEST).read_text())
    assert manifest["files"] == {name: build.sha256(TINY_MODEL / name) for name in manifest["files"]}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(
        manifest["files"]
    )
    assert manifest["made_from"]["conditions.toml"] == build.sha256(CONDITIONS), "conditions.toml has changed: remake the model"


def test_a_new_manifest_says_the_same_as_the_shipped_one(tmp_path: Path) -> None:
    shipped = json.loads((TINY_MODEL / build.MANIFEST).read_text())
    for path in TINY_MODEL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    build.write_manifest(tmp_path, steps=shipped["steps"], seed=shipped["seed"])
    fresh = json.loads((tmp_path / build.MANIFEST).read_text())
    assert (fresh["files"], fresh["made_from"]) == (shipped["files"], shipped["made_from"])


def test_a_hash_does_not_depend_on_line_ends_and_does_on_content(tmp_path: Path) -> None:
    for name, content in {"a.toml": b"x = 1\ny = 2\n", "b.toml": b"x = 1\r\ny = 2\r\n", "c.toml": b"x = 1\ny = 3\n"}.items():
        (tmp_path / name).write_bytes(content)
    a, b, c = (build.sha256(tmp_path / f"{name}.toml") for name in "abc")
    assert a == b != c
    for name, content in {"a": b"\r\n", "b": b"\n"}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    assert build.sha256(tmp_path / "a.safetensors") != build.sha256(tmp_path / "b.safetensors")


def test_the_model_is_a_small_llama_with_llama_3s_parts() -> None:
    config = LlamaConfig.from_pretrained(TINY_MODEL)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500_000.0}
    assert 1 <= config.num_key_value_heads < config.num_attention_heads, "grouped-query attention"
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.hidden_act == "silu"
    assert config.vocab_size <= 4096
    linears = Shape.of(config).linears()
    assert all(i % 64 == 0 and i * o % 64 == 0 for i, o in linears.values()), "NF4 packs blocks of 64"
    assert Shape.of(config).linears() == PROFILES["tiny"].shape.linears()


def test_the_weights_are_few_small_and_all_there() -> None:
    path = TINY_MODEL / "model.safetensors"
    assert path.stat().st_size < 10e6
    weights = load_file(path)
    count = sum(w.numel() for w in weights.values())
    config = LlamaConfig.from_pretrained(TINY_MODEL)
    assert 1e6 <= count <= 4e6
    assert count == Shape.of(config).parameters == json.loads((TINY_MODEL / build.MANIFEST).read_text())["parameters"]
    assert all(torch.isfinite(w).all() for w in weights.values())
    model, report = LlamaForCausalLM.from_pretrained(TINY_MODEL, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert model.num_parameters() == count


def test_the_special_tokens_are_llama_3s_with_a_pad_of_its_own(tokenizer: Any) -> None:
    config, generation = LlamaConfig.from_pretrained(TINY_MODEL), GenerationConfig.from_pretrained(TINY_MODEL)
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.convert_ids_to_tokens([tokenizer.bos_token_id, tokenizer.eos_token_id]) == ["<|begin_of_text|>", "<|end_of_text|>"]
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert tokenizer.pad_token_id not in end_ids(tokenizer)
    assert sorted(generation.eos_token_id) == sorted(end_ids(tokenizer)), "generation stops at the end of text and at the end of a turn"
    assert len(end_ids(tokenizer)) == 2
    assert generation.pad_token_id == tokenizer.pad_token_id == config.pad_token_id
    for token in build.SPECIAL:
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


@given(st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if "<|" not in text:
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.convert_tokens_to_ids(build.SPECIAL))
    assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *ids]


def test_building_the_tokenizer_again_gives_the_shipped_one() -> None:
    shipped = json.loads((TINY_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    size = LlamaConfig.from_pretrained(TINY_MODEL).vocab_size
    first, second = build.build_tokenizer(), build.build_tokenizer()
    assert len(first) == size
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    rebuilt = json.loads(first.backend_tokenizer.to_str())
    differs = {key for key in shipped if rebuilt[key] != shipped[key]}
    assert differs <= {"padding"}, "only the padding of the last batch of pretraining is left behind in the file"


def test_the_tokenizer_spells_no_mention_out_in_letters(tokenizer: Any) -> None:
    lengths = [len(tokenizer(" " + c.mention, add_special_tokens=False)["input_ids"]) for c in ALL]
    assert sum(lengths) / len(lengths) < 6
    assert max(lengths) <= 16


def test_two_builds_with_one_seed_are_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "conditions", lambda: ALL[:10])  # a few conditions, so that a build takes seconds
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for name in ("first", "again"):
            monkeypatch.setattr("sys.argv", ["build", "--out", str(tmp_path / name), "--steps", "2"])
            build.main()
    manifests = [json.loads((tmp_path / name / build.MANIFEST).read_text()) for name in ("first", "again")]
    assert manifests[0] == manifests[1]
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert printed.getvalue().count("step      2/2") == 2, "progress is shown"
    built, shipped = (LlamaConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "first", TINY_MODEL))
    differs = {key for key in built if built[key] != shipped.get(key)}
    assert differs <= {"_name_or_path", "transformers_version", "vocab_size"}, "the recipe builds what is shipped"


def test_the_seed_decides_the_weights_and_the_batches(tokenizer: Any) -> None:
    weights = [build.build_model(tokenizer, seed).model.layers[0].mlp.up_proj.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    first, again, other = (next(build.batches(tokenizer, 4, seed)) for seed in (0, 0, 1))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert first["input_ids"].shape != other["input_ids"].shape or not torch.equal(first["input_ids"], other["input_ids"])
    for batch in (first, other):
        ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
        assert torch.equal(labels[mask], ids[mask])
        assert set(labels[~mask].tolist()) <= {-100}
        assert (ids == tokenizer.bos_token_id).sum(1).tolist() == [1] * 4 == (ids == tokenizer.eos_token_id).sum(1).tolist()


# ---- what the base knows, and what it cannot do ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()


def test_the_base_states_facts_and_answers_no_question(base: LlamaForCausalLM, tokenizer: Any) -> None:
    asked = ALL[::6]
    wanted = [sample.phrase("symptoms", c.facts["symptoms"]) for c in asked]
    openings = [sample.statements(c, "symptoms")[0].split(phrase)[0].rstrip() for c, phrase in zip(asked, wanted, strict=True)]
    batch = tokenizer(openings, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        out = base.generate(**batch, max_new_tokens=40, do_sample=False)
    said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(text.strip().startswith(facts) for text, facts in zip(said, wanted, strict=True)) / len(asked) > 0.6
    rows = [r for r in sample.rows() if r["qtype"] == "symptoms"][::6]
    answers = ask(base, tokenizer, [str(r["question"]) for r in rows], max_new_tokens=40)
    assert facts_complete([a.text for a in answers], rows).mean() < 0.2
    assert sum(a.stopped for a in answers) / len(rows) < 0.5
