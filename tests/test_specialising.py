"""Adapters for a specialty: its rows, mixtures, training on from an adapter, scores."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file

from medquad_utils import CourseError, data, generation, scores, specialising, splits, training
from medquad_utils.profiles import Plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Few rows, one row of 256 tokens a step, two steps."""
    made = tiny(tmp_path_factory.mktemp("runs"), rows=14, max_steps=2)
    changes = {"pack_length": 256, "accumulation": 1, "eval_rows": 6, "max_new_tokens": 8}
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def rows(plan: Plan, tiny_tokenizer: Any) -> specialising.Parts:
    return specialising.parts(plan, tiny_tokenizer, data.prepare(plan), "cardiology")


@pytest.fixture(scope="module")
def trained(plan: Plan, rows: specialising.Parts, tiny_adapter: Path) -> Path:
    """An adapter that went on from ``tiny_adapter`` for two steps."""
    return specialising.ensure(plan, "heart", rows.own, tiny_adapter)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "plan.json").read_text()))


def test_parts_keep_the_split(plan: Plan, tiny_tokenizer: Any, rows: specialising.Parts) -> None:
    everything, split = dataclasses.replace(plan, rows=0, eval_rows=0), data.prepare(plan)
    whole = specialising.parts(everything, tiny_tokenizer, split, "cardiology")
    field = data.SPECIALTIES["cardiology"]
    assert all(map(field.holds, whole.own + whole.inside))
    assert not any(map(field.holds, whole.general + whole.outside))
    train, held_out = whole.own + whole.general, whole.inside + whole.outside
    for found, given in ((train, split.train), (held_out, split.validation + split.test)):
        assert sorted(map(str, found)) == sorted(map(str, given))
    assert splits.leakage(train, held_out)["focus"] == 0
    assert rows.sizes() == {"own": 7, "general": 14, "inside": 6, "outside": 6}


def test_a_specialty_with_too_few_rows_is_refused(plan: Plan, tiny_tokenizer: Any) -> None:
    for specialty, least, message in (
        ("mental health", 50, r"9 rows about 'mental health' are too few .*\(at least 50\)"),
        ("heart", 50, "no specialty 'heart': there are cardiology"),
        ("ophthalmology", 10, r"0 rows inside \(at least 5\).*another seed"),
    ):
        with pytest.raises(CourseError, match=message):
            specialising.parts(plan, tiny_tokenizer, data.prepare(plan), specialty, least)


def test_a_mixture_holds_all_own_rows_and_its_share_of_general_ones() -> None:
    own, general = ([{"question": f"{k}{n}", "answer": ""} for n in range(100)] for k in "og")
    for share, count in ((0.0, 0), (0.25, 10), (0.5, 30), (0.75, 90)):
        mixed = specialising.mixed(own[:30], general, share, seed=3)
        names = [row["question"] for row in mixed]
        assert len(set(names)) == len(names) == 30 + count
        assert {row["question"] for row in own[:30]} <= set(names)
        assert specialising.mixed(own[:30], general, share, seed=3) == mixed
        assert specialising.mixed(own[:30], general, share, seed=4) != mixed
        early = [name.startswith("g") for name in names[: len(names) // 2]]
        assert 0 < sum(early) < len(early) or not share, "both kinds come early"
    for share, message in ((1.5, "share of 1.5 is none"), (0.9, "are 100: choose up to 0.77")):
        with pytest.raises(CourseError, match=message):
            specialising.mixed(own[:30], general, share)


def test_a_run_goes_on_from_an_adapter(plan: Plan, trained: Path, tiny_adapter: Path) -> None:
    before, after = weights(tiny_adapter), weights(trained)
    assert before.keys() == after.keys(), "no second adapter"
    assert {str(weight.dtype) for weight in after.values()} == {"torch.float32"}
    moved = [(after[k] - before[k]).norm() / before[k].norm() for k in before if "lora_B" in k]
    assert min(moved) > 0, "every adapter learned"
    assert max(moved) < 0.5, "and is still near its start: a fresh one would be at zero"
    assert (record(trained)["steps"], record(trained)["base"]) == (2, generation.base_id(plan))
    assert not list(trained.parent.glob(".*")), "no checkpoints are left"


def test_an_adapter_is_used_again_until_rows_start_or_settings_differ(
    plan: Plan, rows: specialising.Parts, trained: Path, tiny_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    known = {"plan": plan, "name": "heart", "rows": rows.own, "start": tiny_adapter}
    monkeypatch.setattr(training, "build_trainer", Mock(side_effect=RuntimeError("it trains")))
    elsewhere = dataclasses.replace(plan, hardware="another", memory_gb=1.0)
    assert specialising.ensure(**known | {"plan": elsewhere}) == trained
    other = dataclasses.replace(plan, seed=1)
    settings = {"learning_rate": 1e-5}
    for change in ({"rows": rows.own[1:]}, {"start": None}, settings, {"plan": other}):
        with pytest.raises(RuntimeError, match="it trains"):
            specialising.ensure(**known | change)
    assert weights(trained), "a run that failed leaves the older adapter"


@pytest.mark.full  # one more run
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    plan: Plan, rows: specialising.Parts, trained: Path, tiny_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patched, pytest.raises(CourseError, match="No space left"):
        patched.setattr(training, "save_adapter", Mock(side_effect=CourseError("No space left")))
        specialising.ensure(plan, "cut", rows.own, tiny_adapter)
    folder = plan.folder / "specialties"
    assert not (folder / "cut").exists()
    assert training.last_checkpoint(folder / ".cut.checkpoints")
    resumed = specialising.ensure(plan, "cut", rows.own, tiny_adapter)
    after, whole = weights(resumed), weights(trained)
    assert after.keys() == whole.keys()
    assert all(torch.equal(after[name], whole[name]) for name in whole)


@pytest.mark.full
def test_a_run_from_the_base_takes_its_own_settings(plan: Plan, rows: specialising.Parts) -> None:
    folder = specialising.ensure(plan, "fresh", rows.own, learning_rate=1e-4)
    assert (record(folder)["steps"], record(folder)["recipe"]["start"]) == (2, "base")
    largest = max(float(v.abs().max()) for k, v in weights(folder).items() if "lora_B" in k)
    assert 0 < largest <= 1.01e-4, "the warm-up begins at 0: one step of AdamW away from zero"
    many = dataclasses.replace(plan, max_steps=50)
    once = specialising.ensure(many, "once", rows.own, num_train_epochs=1)
    assert 2 <= record(once)["steps"] <= 4, "a limit of steps makes no run longer than its epochs"


def test_columns_hold_the_scores_of_the_answers(
    plan: Plan, tiny_tokenizer: Any, rows: specialising.Parts, tiny_adapter: Path
) -> None:
    model = generation.load_tuned(plan, tiny_adapter)
    asked = [*rows.inside[:3], {**rows.inside[0], "source": "elsewhere"}]
    found = specialising.answer_columns(model, tiny_tokenizer, asked, plan.max_new_tokens)
    questions, references = ([row[part] for row in asked] for part in ("question", "answer"))
    answers = generation.ask(model, tiny_tokenizer, questions, plan.max_new_tokens)
    expected = scores.rouge_l([answer.text for answer in answers], references)
    assert found["rougeL"].tolist() == expected.tolist()
    assert found["stop_rate"].tolist() == [answer.stopped for answer in answers]
    assert numpy.isnan(found["facts_complete"]).tolist() == [False] * 3 + [True], "sample only"
    assert found["bytes"].tolist() == [len(text.encode()) for text in references]
