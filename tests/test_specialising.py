"""Sub-corpora apart, mixtures, adapters that start from adapters, and several on one base."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from medquad_utils import data, evaluation, generation, lora, profiles, scores, specialising, training
from medquad_utils.data import Row
from medquad_utils.profiles import CourseError, Hardware, Plan
from tests.conftest import random_adapter

CPU = Hardware("cpu", "any", 16.0, cores=2)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The embedded model on few rows, one row of 256 tokens a step, two steps."""
    made = profiles.resolve("tiny", hardware=CPU, out=str(tmp_path_factory.mktemp("runs")), rows=14, max_steps=2)
    return dataclasses.replace(made, pack_length=256, accumulation=1, eval_rows=6, max_new_tokens=8)


@pytest.fixture(scope="module")
def tokenizer(plan: Plan) -> Any:
    return generation.load_tokenizer(plan)


@pytest.fixture(scope="module")
def splits(plan: Plan) -> data.Splits:
    return data.prepare(plan)


@pytest.fixture(scope="module")
def rows(plan: Plan, tokenizer: Any, splits: data.Splits) -> specialising.Parts:
    return specialising.parts(plan, tokenizer, splits, "cardiology")


@pytest.fixture(scope="module")
def trained(plan: Plan, rows: specialising.Parts, tiny_adapter: Path) -> Path:
    """An adapter that went on from ``tiny_adapter`` for two steps."""
    return specialising.ensure(plan, "heart", rows.own, tiny_adapter)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def alike(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_parts_sort_a_split_and_move_no_row_across_it(plan: Plan, tokenizer: Any, splits: data.Splits) -> None:
    whole = specialising.parts(dataclasses.replace(plan, rows=0, eval_rows=0), tokenizer, splits, "cardiology")
    field = data.SPECIALTIES["cardiology"]
    assert all(map(field.holds, whole.own + whole.inside))
    assert not any(map(field.holds, whole.general + whole.outside))

    def keys(found: list[Row]) -> list[str]:
        return sorted(row["question"] + row["answer"] for row in found)

    assert keys(whole.own + whole.general) == keys(splits.train)
    assert keys(whole.inside + whole.outside) == keys(splits.validation + splits.test)
    assert {data.focus_of(r) for r in whole.inside} >= {"endocarditis"} or {data.focus_of(r) for r in whole.own} >= {"endocarditis"}
    assert data.leakage(whole.own + whole.general, whole.inside + whole.outside)["focus"] == 0


def test_parts_are_as_large_as_the_plan_says_and_fit(plan: Plan, tokenizer: Any, splits: data.Splits, rows: specialising.Parts) -> None:
    assert rows.sizes() == {"own": 7, "general": 14, "inside": 6, "outside": 6}
    short = dataclasses.replace(plan, max_length=58, rows=0, eval_rows=0)
    with pytest.raises(CourseError, match=r"'cardiology' leaves too few rows that fit into 58 tokens: .*2 rows inside \(at least 5\)"):
        specialising.parts(short, tokenizer, splits, "cardiology")


@pytest.mark.parametrize(
    ("specialty", "message"),
    [
        ("mental health", r"9 rows about 'mental health' are too few to train on \(at least 50\)"),
        ("heart", "no specialty 'heart': there are cardiology"),
        (data.Specialty("nothing at all"), "0 rows about 'nothing at all' are too few"),
    ],
)
def test_a_field_without_enough_rows_is_refused_in_one_line(
    plan: Plan, tokenizer: Any, splits: data.Splits, specialty: Any, message: str
) -> None:
    with pytest.raises(CourseError, match=message) as caught:
        specialising.parts(plan, tokenizer, splits, specialty)
    assert "\n" not in str(caught.value)


def test_a_field_that_nobody_can_be_judged_by_is_refused(plan: Plan, tokenizer: Any, splits: data.Splits) -> None:
    with pytest.raises(CourseError, match=r"'ophthalmology' leaves too few rows .*: 0 rows inside \(at least 5\).*another seed"):
        specialising.parts(plan, tokenizer, splits, "ophthalmology", least=10)


@pytest.mark.parametrize(("share", "general"), [(0.0, 0), (0.25, 10), (0.5, 30), (0.75, 90)])
def test_a_mixture_holds_all_own_rows_and_the_share_of_general_ones(share: float, general: int) -> None:
    own = [{"question": f"own {n}", "answer": "a"} for n in range(30)]
    others = [{"question": f"general {n}", "answer": "a"} for n in range(100)]
    mixed = specialising.mixed(own, others, share, seed=3)
    names = [row["question"] for row in mixed]
    assert len(set(names)) == len(names) == 30 + general
    assert {row["question"] for row in own} <= set(names)
    assert specialising.mixed(own, others, share, seed=3) == mixed
    if general:
        assert {r["question"] for r in specialising.mixed(own, others, share, seed=4)} != set(names)
        first_half = names[: len(names) // 2]
        assert 0 < sum(name.startswith("general") for name in first_half) < len(first_half), "both kinds come early"


def test_a_share_that_cannot_be_had_says_what_can() -> None:
    own, general = [{"question": f"own {n}", "answer": ""} for n in range(30)], [{"question": "general", "answer": ""}] * 10
    for share in (-0.1, 1.0, 1.5):
        with pytest.raises(CourseError, match=f"mixing share of {share} is none: expected 0"):
            specialising.mixed(own, general, share)
    with pytest.raises(CourseError, match=r"a share of 0.5 takes 30 general rows, and there are 10: choose up to 0.25"):
        specialising.mixed(own, general, 0.5)
    assert len(specialising.mixed(own, general, 0.25)) == 40


# ---- training -------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_first_adapter_and_leaves_it_alone(plan: Plan, trained: Path, tiny_adapter: Path) -> None:
    assert trained == plan.folder / "specialties" / "heart"
    before, after = weights(tiny_adapter), weights(trained)
    assert before.keys() == after.keys()
    moved = [float((after[k] - before[k]).norm() / before[k].norm()) for k in before if "lora_B" in k]
    assert min(moved) > 0, "every adapter learned"
    assert max(moved) < 0.5, "and is still close to where it started: a fresh lora_B would have lost all of it"
    record = json.loads((trained / "plan.json").read_text())
    assert record["steps"] == 2
    assert record["recipe"]["start"] != "base"
    assert record["base"] == generation.base_id(plan)
    assert sorted(p.name for p in trained.parent.iterdir()) == ["heart"], "no checkpoints are left behind"


def test_what_is_there_is_used_again_until_rows_start_or_settings_differ(
    plan: Plan, rows: specialising.Parts, trained: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trains(Exception): ...

    def build(*_: Any, **__: Any) -> None:
        raise Trains

    monkeypatch.setattr(training, "build_trainer", build)
    assert specialising.ensure(plan, "heart", rows.own, tiny_adapter) == trained
    other_machine = dataclasses.replace(plan, hardware="another", memory_gb=1.0)
    assert specialising.ensure(other_machine, "heart", rows.own, tiny_adapter) == trained
    for changed in (
        lambda: specialising.ensure(plan, "heart", rows.own[1:], tiny_adapter),
        lambda: specialising.ensure(plan, "heart", rows.own),
        lambda: specialising.ensure(plan, "heart", rows.own, tiny_adapter, learning_rate=1e-5),
        lambda: specialising.ensure(dataclasses.replace(plan, seed=1), "heart", rows.own, tiny_adapter),
    ):
        with pytest.raises(Trains):
            changed()
    assert weights(trained), "a run that failed leaves the older adapter"


def test_a_run_from_the_base_with_settings_of_its_own(plan: Plan, rows: specialising.Parts) -> None:
    folder = specialising.ensure(plan, "fresh", rows.own, learning_rate=1e-4)
    record = json.loads((folder / "plan.json").read_text())
    assert (record["steps"], record["recipe"]["start"]) == (2, "base")
    largest = max(float(v.abs().max()) for k, v in weights(folder).items() if "lora_B" in k)
    assert 0 < largest <= 1.01e-4, "the first step of a warm-up has a rate of 0, so this is one step of AdamW away from zero"


def test_a_limit_of_steps_never_makes_a_run_longer_than_its_epochs(plan: Plan, rows: specialising.Parts) -> None:
    folder = specialising.ensure(dataclasses.replace(plan, max_steps=50), "whole", rows.own, num_train_epochs=1)
    assert 2 <= json.loads((folder / "plan.json").read_text())["steps"] <= 4, "seven rows fill two to four of 256 tokens"


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    plan: Plan, rows: specialising.Parts, trained: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise CourseError("cannot save the adapter: No space left on device.")

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_adapter", full)
        with pytest.raises(CourseError, match="No space left"):
            specialising.ensure(plan, "cut", rows.own, tiny_adapter)
    assert not (plan.folder / "specialties" / "cut").exists()
    kept = training.last_checkpoint(plan.folder / "specialties" / ".cut.checkpoints")
    assert kept is not None
    assert alike(specialising.ensure(plan, "cut", rows.own, tiny_adapter), trained)


def test_a_trainer_on_an_adapter_gets_no_second_one_and_the_plans_dtype(plan: Plan, tokenizer: Any, tiny_adapter: Path) -> None:
    model = generation.load_adapters(plan, {"default": tiny_adapter}, trainable=True)
    parts = data.Splits(data.prepare(plan).train[:3], [], [])
    trainer = training.build_trainer(plan, model, tokenizer, parts, plan.folder / "work", eval_strategy="no")
    assert list(trainer.model.peft_config) == ["default"]
    assert set(lora.dtype_census(trainer.model)["trained"]) == {plan.adapter_dtype}
    assert lora.trainable_parameters(trainer.model) == lora.adapter_parameters(profiles.Shape.of(model.config), plan.lora_r)


# ---- several adapters on one base -----------------------------------------------------------------------------------


def test_adapters_take_turns_on_one_base_and_each_answers_as_alone(plan: Plan, tokenizer: Any, trained: Path, tiny_adapter: Path) -> None:
    both: Any = generation.load_adapters(plan, {"general": tiny_adapter, "heart": trained})
    assert lora.trainable_parameters(both) == 0
    ids = torch.tensor([tokenizer("What causes stroke?")["input_ids"]])

    def logits(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(ids).logits
        return found

    alone = {name: logits(generation.load_tuned(plan, folder)) for name, folder in (("general", tiny_adapter), ("heart", trained))}
    assert torch.equal(logits(both), alone["general"]), "the first one is active"
    for name in ("heart", "general", "heart"):
        both.set_adapter(name, inference_mode=True)
        assert torch.equal(logits(both), alone[name])
    assert not torch.equal(alone["heart"], alone["general"])
    with both.disable_adapter():
        assert torch.equal(logits(both), logits(generation.load_base(plan)))


def test_adapters_of_different_bases_are_refused_by_name_before_anything_is_loaded(
    plan: Plan, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = Path(shutil.copytree(trained, tmp_path / "foreign"))
    record = json.loads((foreign / "plan.json").read_text())
    monkeypatch.setattr(generation, "load_base", lambda *_: pytest.fail("the base was loaded"))
    for change in ({"model_id": "some/llama", "base": "some/llama@main"}, {"base": "0123456789abcdef"}):
        (foreign / "plan.json").write_text(json.dumps(record | change))
        with pytest.raises(CourseError, match=r"different bases .*: 'heart' was trained on embedded .*, 'foreign' on ") as caught:
            generation.load_adapters(plan, {"heart": trained, "foreign": foreign})
        assert next(iter(change.values())) in str(caught.value)
        assert "\n" not in str(caught.value)
    (foreign / "plan.json").unlink()
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/llama"}))
    with pytest.raises(CourseError, match="'foreign' on some/llama"):
        generation.load_adapters(plan, {"heart": trained, "foreign": foreign})


def test_an_adapter_that_does_not_say_where_it_is_from_is_tried(plan: Plan, trained: Path, tmp_path: Path) -> None:
    silent = Path(shutil.copytree(trained, tmp_path / "silent"))
    (silent / "plan.json").unlink()  # and its config names a folder of the machine that trained it
    generation.check_same_base({"heart": trained, "silent": silent})
    assert list(generation.load_adapters(plan, {"heart": trained, "silent": silent}).peft_config) == ["heart", "silent"]  # type: ignore[attr-defined]


def test_a_second_adapter_of_another_shape_is_refused_by_its_folder(plan: Plan, trained: Path, tmp_path: Path) -> None:
    other = random_adapter(dataclasses.replace(plan, lora_r=4, lora_alpha=8), tmp_path / "other", {"base": generation.base_id(plan)})
    assert len(generation.load_adapters(plan, {"heart": trained, "other": other}).peft_config) == 2, "another rank is no other base"  # type: ignore[attr-defined]
    file = other / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CourseError, match=r"the adapter in other/ does not load onto embedded"):
        generation.load_adapters(plan, {"heart": trained, "other": other})


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_columns_hold_what_the_answers_say_and_how_likely_the_references_are(
    plan: Plan, tokenizer: Any, rows: specialising.Parts, tiny_adapter: Path
) -> None:
    model = generation.load_tuned(plan, tiny_adapter)
    asked = [*rows.inside[:3], {**rows.inside[0], "source": "elsewhere"}]
    found = specialising.answer_columns(model, tokenizer, asked, plan.max_new_tokens)
    answers = [a.text for a in generation.ask(model, tokenizer, [row["question"] for row in asked], plan.max_new_tokens)]
    assert found["rougeL"].tolist() == scores.rouge_l(answers, [row["answer"] for row in asked]).tolist()
    assert numpy.isnan(found["facts_complete"]).tolist() == [False, False, False, True], "only the sample lists its facts"
    assert found["bytes"].tolist() == [len(row["answer"].encode()) for row in asked]
    other = {name: values + (0.5 if name == "rougeL" else 0) for name, values in found.items()}
    summary = evaluation.summary({"general": found, "other": other}, versus=("general",))["versus general"]["other"]
    assert summary["rougeL"]["mean"] == pytest.approx(0.5)
    assert summary["bits_per_byte"]["mean"] == 0
