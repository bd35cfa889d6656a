"""Training: the trainer's input, what steps change, resume, saving, adapters of a specialty."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
import transformers
from conftest import tiny
from safetensors.torch import load_file
from transformers import TrainerCallback

from medquad_utils import (
    CourseError,
    adapters,
    chat,
    data,
    evaluation,
    files,
    generation,
    lora,
    machine,
    merging,
    preflight,
    profiles,
    scores,
    specialise,
    specialties,
    splits,
    training,
)  # fmt: skip
from medquad_utils.machine import Hardware
from medquad_utils.profiles import TINY_MODEL, Plan

CPU = Hardware("cpu", "any", 16.0, cores=2)
CPU_BF16 = Hardware("cpu", "any", 16.0, bf16_cpu=True)
T4 = Hardware("cuda", "Tesla T4", 15.6, (7, 5), gpus=1)
A100 = Hardware("cuda", "NVIDIA A100", 42.4, (8, 0), gpus=1)
WEIGHTS = Path("adapter", "adapter_model.safetensors")
BEGINS, ENDS = "BOS tokens per example", "end tokens in the loss per answer"
PROMPTS = "prompts in training are those of use"


def small_plan(out: Path, **changes: Any) -> Plan:
    """14 rows, packed into four of 256 tokens, two a step: two steps an epoch, three epochs."""
    plan = tiny(out, rows=14).with_fit(pack_length=256, accumulation=2)
    return dataclasses.replace(plan, **({"eval_rows": 4, "epochs": 3} | changes))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy all parameters, and the scales of the 4-bit ones."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Saves(TrainerCallback):
    """Note at which step a checkpoint was saved, and after how many validations."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append((state.global_step, sum("eval_loss" in e for e in state.log_history)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whole run of four steps: its parts, its weights before, its checkpoints, its metrics."""
    made = SimpleNamespace(plan=small_plan(tmp_path_factory.mktemp("run"), max_steps=4))
    checks, made.saves = preflight.checks, Saves()

    def look(plan: Plan, tokenizer: Any, rows: list[files.Row], trainer: Any) -> Any:
        made.tokenizer, made.rows, made.trainer = tokenizer, rows, trainer
        (plan.folder / "checkpoints" / "copy of checkpoint-3").mkdir()  # somebody's
        made.before, made.checks = weights(trainer.model), checks(plan, tokenizer, rows, trainer)
        trainer.add_callback(made.saves)
        return made.checks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "checks", look)
        made.metrics = training.train(made.plan)
    return made


def new_trainer(run: Any, plan: Plan, **changes: Any) -> Any:
    """Build a trainer for another plan on the rows of ``run``."""
    rows = splits.Splits(run.rows, run.rows[:4], [])
    return training.build_trainer(plan, generation.load_base(plan), run.tokenizer, rows, **changes)


def test_a_cpu_computes_the_loss_in_narrow_tiles(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.kernels import chunked_logprob as kernel

    fold, losses = kernel._forward_tile, []
    widths: set[int] = set()

    def watched(tile: torch.Tensor, *rest: Any, **flags: Any) -> None:
        widths.add(tile.shape[1])
        fold(tile, *rest, **flags)

    monkeypatch.setattr(kernel, "_forward_tile", watched)
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 32768)
    for columns in (8192, 1024):
        monkeypatch.setattr(training, "CPU_LOSS_COLUMNS", columns)
        trainer = new_trainer(run, small_plan(tmp_path))
        batch = trainer.data_collator([trainer.train_dataset[0]])
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert widths == {trainer.model.config.vocab_size, 1024}
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_precision_follows_the_plan_and_not_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    # TrainingArguments asks this machine for bf16, but the plan is for another one.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    for hardware, expected in ((CPU, (False, False)), (CPU_BF16, (True, False)),
                               (T4, (False, True)), (A100, (True, False))):  # fmt: skip
        plan = profiles.resolve("tiny", hardware=hardware, out="runs")
        config = training.sft_config(plan)
        assert (config.bf16, config.fp16) == expected
        step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        assert step * config.max_length == profiles.PROFILES["tiny"].tokens_per_step


def test_the_seed_decides_the_first_weights_and_the_order(run: Any, tmp_path: Path) -> None:
    lora_a = [name for name in run.before if ".lora_A." in name]
    for seed in (0, 1):
        plan = small_plan(tmp_path, seed=seed)
        torch.manual_seed(5)  # noise that the plan's seed must overrule
        start = weights(new_trainer(run, plan).model)
        assert {torch.equal(start[name], run.before[name]) for name in lora_a} == {seed == 0}
        assert training.sft_config(plan).seed == seed


def test_trls_own_labels_equal_those_that_the_lesson_shows(run: Any) -> None:
    shown = [chat.encode(run.tokenizer, row) for row in run.rows]
    given = preflight._examples(run.trainer)
    expected = sorted((list(e.ids), list(e.labels)) for e in shown)
    assert sorted((ids.tolist(), labels.tolist()) for ids, labels in given) == expected


def test_preflight_passes_on_the_sample(run: Any) -> None:
    preflight.require(run.checks)
    counts = {what: text for what, text, _ in run.checks}
    assert (counts[BEGINS], counts[ENDS]) == ("1 in each of 14", "1 in each of 14")
    assert counts["adapter dtype"] == run.plan.adapter_dtype == "float32", "TRL casts to bf16"


def test_preflight_on_a_gpu_looks_for_what_triton_needs(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """TRL's loss is a Triton kernel on every GPU, and Triton compiles C at its first use."""
    plan = dataclasses.replace(run.plan, device="cuda")
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: str(tmp_path))
    checks = preflight.checks(plan, run.tokenizer, run.rows, run.trainer)
    said = "pre-flight check failed: what Triton needs: no C compiler and no Python.h: apt-get"
    with pytest.raises(CourseError, match=said):
        preflight.require(checks)
    (tmp_path / "gcc").touch(0o755)
    (tmp_path / "Python.h").touch()
    assert machine.triton_needs() == ("C compiler, Python.h", True)


@pytest.mark.parametrize(
    ("spoil", "what", "text"),
    [
        (lambda x, y: ([x[0], *x], [chat.IGNORED, *y]), BEGINS, "1 in 11, 2 in 1"),  # two BOS
        (lambda x, y: (x[:-1], y[:-1]), ENDS, "0 in 1, 1 in 11"),
        (lambda x, y: ([*x, x[-1]], [*y, y[-1]]), ENDS, "1 in 11, 2 in 1"),
        (lambda x, y: ([*x, 5], [*y, 5]), "pad tokens in the loss", "1"),
        (lambda x, y: ([*x[:9], *x[10:]], [*y[:9], *y[10:]]), PROMPTS, "12 prompts"),
    ],
)
def test_preflight_finds_one_bad_example(run: Any, spoil: Any, what: str, text: str) -> None:
    assert run.tokenizer.pad_token_id == 5
    pack, *others = run.trainer.train_dataset
    first = pack["seq_lengths"][0]
    ids, labels = spoil(pack["input_ids"][:first], pack["labels"][:first])
    spoiled = {"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]}
    trainer = SimpleNamespace(**vars(run.trainer) | {"train_dataset": [spoiled, *others]})
    checks = preflight.checks(run.plan, run.tokenizer, run.rows, trainer)
    failed = {w: t for w, t, right in checks if not right}
    assert failed.pop(what) == text
    assert not failed or (what, set(failed)) == (BEGINS, {PROMPTS}), (
        "a second BOS is another prompt"
    )


def texts(row: Any) -> tuple[str, str]:
    return row["question"], row["answer"]


def test_rows_that_are_too_long_are_left_out_and_not_cut(run: Any) -> None:
    split = data.prepare(run.plan)
    lengths = {texts(r): len(chat.encode(run.tokenizer, r).ids) for r in split.train}
    limit = sorted(lengths.values())[len(lengths) // 2]
    plan = dataclasses.replace(run.plan, rows=0).with_fit(max_length=limit)
    chosen = training.select(plan, run.tokenizer, split)
    expected = {row for row, length in lengths.items() if length <= limit}
    assert set(map(texts, chosen.train)) == expected
    assert 0 < len(expected) < len(lengths)
    assert all(row in split.train for row in chosen.train)
    with pytest.raises(CourseError, match="fits into 8 tokens"):
        training.select(plan.with_fit(max_length=8), run.tokenizer, split)


def test_every_adapter_learns_and_frozen_weights_keep_every_bit(run: Any) -> None:
    before, after = run.before, weights(run.trainer.model)
    assert before.keys() == after.keys()
    assert any(name.endswith(".nested_absmax") for name in after), "no 4-bit weight among them"
    frozen = [name for name in after if ".lora_" not in name]
    assert [name for name in frozen if not torch.equal(after[name], before[name])] == []
    learned = [name for name in after if ".lora_B." in name]
    assert len(learned) == 7 * run.trainer.model.config.num_hidden_layers
    assert not any(before[name].any() for name in learned), "an adapter starts as no change"
    assert all(0 < float(after[name].norm()) < math.inf for name in learned)


def test_a_run_of_four_steps_has_losses_and_checkpoints(run: Any) -> None:
    curve, validation = run.metrics["train_curve"], run.metrics["validation_curve"]
    assert run.metrics["steps"] == 4
    assert (run.metrics["rows"], run.metrics["packed_rows"]) == (14, 4), "examples are counted"
    assert [step for step, _ in curve] == [1]
    assert [step for step, _ in validation] == [2, 4]
    assert run.metrics["loss_first"] == run.metrics["loss_last"] == round(curve[0][1], 4)
    assert all(math.isfinite(loss) for _, loss in [*curve, *validation])
    written = json.loads((run.plan.folder / "metrics" / "train.json").read_text())
    assert written["validation_loss"] == round(validation[-1][1], 4)
    assert run.saves.seen == [(1, 0), (2, 1), (3, 1), (4, 2)], "after the validation of its step"
    (left,) = (run.plan.folder / "checkpoints").iterdir()
    assert left.name == "copy of checkpoint-3", "a finished run leaves what is not its own"
    left.rmdir()
    left.with_name("plan.json").touch()
    training.finish(run.plan, run.trainer, 1.0)
    assert not left.parent.exists(), "and no empty folder"


def test_a_nan_loss_stops_the_run_at_the_next_log(run: Any, tmp_path: Path) -> None:
    """By default transformers hides a NaN from the log: the run would go on and save rubbish."""
    trainer = new_trainer(run, small_plan(tmp_path))
    trainer.args.logging_steps = 1
    norms = (p for name, p in trainer.model.named_parameters() if name.endswith("norm.weight"))
    with torch.no_grad():
        next(norms).fill_(float("nan"))
    with pytest.raises(CourseError, match=r"loss is nan at step 1.*learning rate"):
        trainer.train()


def test_a_question_is_asked_after_the_given_steps_and_the_last(monkeypatch: Any) -> None:
    callbacks: list[Any] = []
    trainer: Any = SimpleNamespace(add_callback=callbacks.append, processing_class="tokenizer")
    asked, model = Mock(return_value=[SimpleNamespace(text="so")]), Mock()
    monkeypatch.setattr(training.generation, "ask", asked)
    answers = training.ask_while_training(trainer, tiny(), "Why?", (2, 9))
    for step in range(1, 5):
        state = SimpleNamespace(global_step=step, max_steps=4)
        callbacks[0].on_step_end(None, state, None, model=model)
    assert answers == {2: "so", 4: "so"}
    asked.assert_called_with(model, "tokenizer", ["Why?"], 64)
    assert model.eval.call_count == 2, "no dropout while it answers"


def test_an_idle_adapter_stops_a_run(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "WATCHED", 2)
    plan = small_plan(tmp_path)
    trainer = new_trainer(run, plan)
    with pytest.raises(CourseError, match=r"28 adapters did not learn.*enable_input_require_grads"):
        training.finish(plan, trainer, 0.0)
    name, stuck = next((n, p) for n, p in trainer.model.named_parameters() if ".lora_B." in n)
    stuck.register_hook(torch.zeros_like)
    stuck_at = rf"1 adapters did not learn.*{name.split('.')[-4]}.*gradients do not reach"
    with pytest.raises(CourseError, match=stuck_at):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not (plan.folder / "adapter").exists()


def checkpoint(plan: Plan, step: int | str, state: str = "{}") -> Path:
    folder = plan.folder / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(state)
    (folder / "rng_state.pth").touch()
    return folder


def test_a_torn_checkpoint_is_removed_and_the_newest_whole_one_taken(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    assert training.resumable(plan) is None
    older, newest = checkpoint(plan, 9), checkpoint(plan, 10)
    torn, empty = checkpoint(plan, 100, '{"global_step"'), checkpoint(plan, 101)
    (empty / "trainer_state.json").unlink()
    (older / "rng_state_1.pth").touch()  # of a second process
    others = [checkpoint(plan, name) for name in ("12 (1)", "x", "13.bak")]
    others += [newest.with_name("checkpoint-14.zip"), newest.with_name("checkpoint-15")]
    [path.touch() for path in others[3:]]
    assert training.checkpoints(newest.parent) == [empty, torn, newest, older]
    assert training.last_checkpoint(newest.parent, processes=2) == older
    assert training.resumable(plan) == newest
    assert [torn.exists(), empty.exists()] == [False, False]
    assert all(path.exists() for path in others), "copies and archives are somebody's"


@pytest.mark.full
def test_runs_killed_at_random_moments_end_bit_equal() -> None:
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), "6", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.endswith("kills or more: 0 runs with a fault\n")
    assert re.search(r"checkpoint-\d", done.stdout), "no kill came after a checkpoint"


def test_other_settings_do_not_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(tmp_path)
    training.resumable(plan)
    there = checkpoint(plan, 2)
    other = {"lora_r": 8, "seed": 1, "learning_rate": 1e-3, "rows": 15, "processes": 2, "epochs": 1}
    for name, value in other.items():
        with pytest.raises(CourseError, match=rf"{name} was .*, now .*Delete the folder"):
            training.resumable(dataclasses.replace(plan, **{name: value}))
    assert training.resumable(plan) == there, "a refusal does not change the owner"
    moved = dataclasses.replace(plan, hardware="another machine", why="auto", card_gb=99.0)
    assert training.resumable(moved) == there
    files.write_json(plan.folder / "data" / "data.json", {"splits": "other rows"})
    with pytest.raises(CourseError, match=r"data was '', now 'other rows'"):
        training.resumable(plan)
    monkeypatch.setattr(training, "base_id", lambda plan: "other weights")
    with pytest.raises(CourseError, match=r"base was .*, now 'other weights'"):
        training.resumable(plan)


def test_a_resumed_run_in_bf16_has_the_adapters_and_losses_of_a_whole_one(
    run: Any, tmp_path: Path
) -> None:
    """peft loads 16-bit adapters of a checkpoint as fp32: the run would go on as another one."""
    planned = profiles.resolve("tiny", hardware=CPU_BF16)
    dtypes = {name: getattr(planned, name) for name in ("compute_dtype", "adapter_dtype")}
    assert dtypes["compute_dtype"] == "bfloat16"
    plan = small_plan(tmp_path, **dtypes).with_fit(accumulation=1)
    settings: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "save_total_limit": 3}
    kinds, losses = [], []
    for checkpoint in (None, plan.folder / "checkpoints" / "checkpoint-1"):
        trainer = new_trainer(run, plan, **settings)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        kinds.append(lora.dtype_census(trainer.model)["trained"])
        losses.append(training.curve(trainer, "loss"))
    assert kinds[0] == kinds[1]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def diseases(file: Path, prefix: str = "") -> None:
    """Write two questions about each of 40 diseases, whose names begin with ``prefix``."""
    lines = ["qtype,question,answer,focus"]
    for n in range(40):
        told = f"is a disease with the number {n} in a list of forty such diseases."
        lines.append(f"causes,What causes D{n} ?,The cause {told},{prefix}D{n}")
        lines.append(f"symptoms,What are the symptoms of D{n} ?,The sign {told},{prefix}D{n}")
    file.write_text("\n".join(lines))


def test_an_adapter_of_other_rows_weights_or_settings_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under one name the file gets other diseases, and so another split; and so on."""
    diseases(file := tmp_path / "t.csv")
    plan, trained = tiny(tmp_path, source="csv", data_path=str(file)), list[Plan]()

    def train(plan: Plan) -> None:
        trained.append(plan)
        files.write_json(plan.folder / "adapter" / "plan.json", training.record_of(plan))

    monkeypatch.setattr(training, "train", train)
    assert training.ensure_adapter(plan) == plan.folder / "adapter"
    training.ensure_adapter(dataclasses.replace(plan, compute_dtype="bfloat16", why="elsewhere"))
    moved = tmp_path / "moved" / "t.csv"
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    training.ensure_adapter(dataclasses.replace(plan, data_path=str(moved)))
    assert len(trained) == 1, "the same rows and settings"
    capsys.readouterr()
    diseases(file, prefix="rare ")
    training.ensure_adapter(plan)
    assert len(trained) == 2
    assert "An adapter is trained: data was " in capsys.readouterr().out
    for name, value in {"rows": 8, "max_steps": 2, "lora_r": 4}.items():
        other = dataclasses.replace(plan, **{name: value}, model_id="me/base")
        said = rf"\(base was .*{name} was .*, now {value}[;)].* or medquad train --profile tiny"
        with pytest.raises(CourseError, match=said):
            training.ensure_adapter(other)
    assert len(trained) == 2, "on another base nothing trains unasked"


def test_an_adapter_is_saved_whole(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, extra = run.plan.folder / WEIGHTS, run.plan.folder / "adapter" / "of an older run"
    file.write_bytes(b"older")
    extra.touch()
    before = {path: path.read_bytes() for path in run.plan.folder.rglob("*.*")}
    failing = Mock(side_effect=OSError(28, "No"))
    with monkeypatch.context() as patch, pytest.raises(CourseError, match=r"No\. Check .*space"):
        patch.setattr(run.trainer.processing_class, "save_pretrained", failing)
        training.save_adapter(run.plan, run.trainer)  # breaks after the weights
    assert {path: path.read_bytes() for path in run.plan.folder.rglob("*.*")} == before
    assert training.save_adapter(run.plan, run.trainer) == file.parent
    assert not extra.exists()
    held = {n: t for n, t in weights(run.trainer.model).items() if ".lora_" in n}
    saved = load_file(file)
    assert len(saved) == len(held)
    assert all(torch.equal(saved[name.replace(".default", "")], t) for name, t in held.items())
    assert (record(file.parent)["model_id"], record(file.parent)["model_path"]) == ("embedded", "")
    texts = [p.read_text() for p in file.parent.iterdir() if p.suffix in (".json", ".md")]
    assert not [text for text in texts if str(TINY_MODEL) in text], "a path of this machine"
    moved = dataclasses.replace(run.plan, model_path=str(TINY_MODEL))
    folder = training.save_adapter(moved, run.trainer, folder=file.parent.with_name("local"))
    base = record(folder)["model_path"]
    assert not Path(base).is_absolute() and (folder / base).samefile(TINY_MODEL)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Few rows, one row of 256 tokens a step, two steps."""
    made = tiny(tmp_path_factory.mktemp("runs"), rows=42, max_steps=2)
    made = made.with_fit(pack_length=256, accumulation=1)
    return dataclasses.replace(made, eval_rows=6, max_new_tokens=8)


@pytest.fixture(scope="module")
def rows(plan: Plan, tiny_tokenizer: Any) -> training.Parts:
    return specialise.parts(plan, tiny_tokenizer, data.prepare(plan), "cardiology")


@pytest.fixture(scope="module")
def trained(plan: Plan, rows: training.Parts, tiny_adapter: Path) -> Path:
    """An adapter that went on from ``tiny_adapter`` for two steps."""
    return specialise.ensure(plan, "heart", rows.own, tiny_adapter)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS.name)


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "plan.json").read_text()))


def test_parts_keep_the_split(plan: Plan, tiny_tokenizer: Any, rows: training.Parts) -> None:
    everything, split = dataclasses.replace(plan, rows=0, eval_rows=0), data.prepare(plan)
    whole = specialise.parts(everything, tiny_tokenizer, split, "cardiology")
    field = specialties.SPECIALTIES["cardiology"]
    assert all(map(field.holds, whole.own + whole.inside))
    assert not any(map(field.holds, whole.general + whole.outside))
    train, held_out = whole.own + whole.general, whole.inside + whole.outside
    for found, given in ((train, split.train), (held_out, split.validation + split.test)):
        fit = [r for r in given if len(chat.encode(tiny_tokenizer, r).ids) <= plan.fit.max_length]
        assert sorted(map(str, found)) == sorted(map(str, fit)) and len(fit) < len(given)
    assert splits.leakage(train, held_out)["focus"] == 0
    assert rows.sizes() == {"own": 7, "general": 7, "inside": 6, "outside": 6}


def test_a_specialty_with_too_few_rows_is_refused(plan: Plan, tiny_tokenizer: Any) -> None:
    split = data.prepare(plan)
    for specialty, rows, message in (
        ("mental health", split, r"9 rows about 'mental health' are too few .*\(at least 50\)"),
        ("cardiology", dataclasses.replace(split, validation=[], test=[]), "'inside': 0.* seed"),
    ):
        with pytest.raises(CourseError, match=message):
            specialise.parts(plan, tiny_tokenizer, rows, specialty)


def test_a_mixture_holds_all_own_rows_and_its_share_of_general_ones() -> None:
    own, general = ([{"question": f"{k}{n}", "answer": ""} for n in range(100)] for k in "og")
    for share, count in ((0.0, 0), (0.25, 10), (0.5, 30), (0.75, 90)):
        mixed = specialise.mixed(own[:30], general, share, seed=3)
        names = [row["question"] for row in mixed]
        assert len(set(names)) == len(names) == 30 + count
        assert {row["question"] for row in own[:30]} <= set(names)
        assert specialise.mixed(own[:30], general, share, seed=3) == mixed
        assert specialise.mixed(own[:30], general, share, seed=4) != mixed
        early = [name.startswith("g") for name in names[: len(names) // 2]]
        assert 0 < sum(early) < len(early) or not share, "both kinds come early"
    for share in (-0.1, 0.9, 1.5):
        with pytest.raises(CourseError, match=r"100 general rows choose from 0, .* to 0\.77"):
            specialise.mixed(own[:30], general, share)


def test_a_run_goes_on_from_an_adapter(plan: Plan, trained: Path, tiny_adapter: Path) -> None:
    before, after = saved(tiny_adapter), saved(trained)
    assert before.keys() == after.keys(), "no second adapter"
    assert {str(weight.dtype) for weight in after.values()} == {"torch.float32"}
    moved = [(after[k] - before[k]).norm() / before[k].norm() for k in before if "lora_B" in k]
    assert min(moved) > 0, "every adapter learned"
    assert max(moved) < 0.5, "and is still near its start: a fresh one would be at zero"
    assert (record(trained)["steps"], record(trained)["base"]) == (2, adapters.base_id(plan))
    assert not list(trained.parent.glob(".*")), "no checkpoints are left"


def test_an_adapter_is_used_again_until_rows_start_or_settings_differ(
    plan: Plan, rows: training.Parts, trained: Path, tiny_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    known = {"plan": plan, "name": "heart", "rows": rows.own, "start": tiny_adapter}
    monkeypatch.setattr(training, "build_trainer", Mock(side_effect=RuntimeError("it trains")))
    elsewhere = dataclasses.replace(plan, hardware="another", card_gb=1.0)
    assert specialise.ensure(**known | {"plan": elsewhere}) == trained
    other = dataclasses.replace(plan, seed=1)
    settings = {"learning_rate": 1e-5}
    read = {"rows": [row | {"passages": ["Gout: rest."]} for row in rows.own]}
    for change in ({"rows": rows.own[1:]}, read, {"start": None}, settings, {"plan": other}):
        with pytest.raises(RuntimeError, match="it trains"):
            specialise.ensure(**known | change)
    assert saved(trained), "a run that failed leaves the older adapter"


def test_a_base_is_trained_on_twice_and_given_back_as_it_was(
    plan: Plan, rows: training.Parts, trained: Path, tiny_adapter: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = generation.load_base(plan)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    shared = {"rows": rows.own, "base": base, "disable_tqdm": True}
    fresh = specialise.ensure(plan, "new", **shared, max_steps=9, learning_rate=1e-4)
    largest = max(float(v.abs().max()) for k, v in saved(fresh).items() if "lora_B" in k)
    assert 0 < largest <= 1.01e-4, "the warm-up begins at 0: one step of AdamW away from zero"
    many = dataclasses.replace(plan, max_steps=50)
    capsys.readouterr()
    again = specialise.ensure(many, "again", **shared, start=tiny_adapter, max_steps=2)
    assert capsys.readouterr().out == ""
    assert record(fresh)["steps"] == record(again)["steps"] == 2, "the lower limit counts"
    after, alone = saved(again), saved(trained)
    assert all(torch.equal(after[name], alone[name]) for name in alone | after)
    now = base.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in now)
    assert not base.training and base(torch.tensor([[5, 6]])).logits.shape[1] == 2
    generation.load_adapters(plan, {"default": tiny_adapter}, base=base)
    with pytest.raises(CourseError, match="carries adapters already"):
        specialise.ensure(plan, "third", **shared)


@pytest.mark.full  # one more run
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    plan: Plan, rows: training.Parts, trained: Path, tiny_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patched, pytest.raises(CourseError, match="No space left"):
        patched.setattr(training, "save_adapter", Mock(side_effect=CourseError("No space left")))
        specialise.ensure(plan, "cut", rows.own, tiny_adapter)
    folder = plan.folder / "specialties"
    assert not (folder / "cut").exists()
    assert training.last_checkpoint(folder / ".cut.checkpoints")
    resumed = specialise.ensure(plan, "cut", rows.own, tiny_adapter)
    after, whole = saved(resumed), saved(trained)
    assert after.keys() == whole.keys()
    assert all(torch.equal(after[name], whole[name]) for name in whole)


def test_a_trained_base_is_gone_before_the_next_one_comes(
    plan: Plan, rows: training.Parts, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL patches ``forward`` with a bound method: a trained base refers to itself."""
    before_load: list[int] = []
    bases: list[weakref.ref[Any]] = []
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def load(*args: Any, **kwargs: Any) -> Any:
        before_load.append(sum(base() is not None for base in bases))
        loaded = from_pretrained(*args, **kwargs)  # model and loading report
        bases.append(weakref.ref(loaded[0]))
        return loaded

    gc.collect()
    gc.disable()  # the collector may run at any time: nothing may depend on it
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    try:
        specialise.ensure(plan, "one", rows.own, tiny_adapter)
        two = specialise.ensure(dataclasses.replace(plan, max_steps=50), "two", rows.own[:4])
        training.train(dataclasses.replace(plan, out=plan.out + "/other"))
        merging.drift(plan, rows.own[:1], tiny_adapter, most=4)
        generation.load_tuned(plan, tiny_adapter)
    finally:
        gc.enable()
    assert before_load == [0] * 8, "bases alive when the next one was loaded"
    assert record(two)["steps"] < 9, "a limit of steps makes no run longer than its epochs"


@pytest.mark.parametrize(("rows", "accumulation", "epochs"), [(5, 2, 3), (9, 4, 2), (8, 2, 1)])
def test_a_limit_far_above_a_run_leaves_its_steps(
    rows: int, accumulation: int, epochs: int
) -> None:
    """The trainer rounds up within each epoch."""
    plan = dataclasses.replace(tiny(), max_steps=1000).with_fit(accumulation=accumulation)
    args = SimpleNamespace(disable_tqdm=False, num_train_epochs=float(epochs), max_steps=-1)
    trainer: Any = SimpleNamespace(args=args, train_dataset=range(rows))
    specialise._limit_steps(plan, trainer, 0)
    assert args.max_steps == math.ceil(rows / accumulation) * epochs


def test_columns_hold_the_scores_of_the_answers(
    plan: Plan, tiny_tokenizer: Any, rows: training.Parts, tiny_adapter: Path
) -> None:
    model = generation.load_tuned(plan, tiny_adapter)
    asked = [*rows.inside[:3], {**rows.inside[0], "source": "elsewhere"}]
    found = evaluation.answer_columns(model, tiny_tokenizer, asked, plan.max_new_tokens)
    questions, references = ([row[part] for row in asked] for part in ("question", "answer"))
    answers = generation.ask(model, tiny_tokenizer, questions, plan.max_new_tokens)
    expected = scores.rouge_l([answer.text for answer in answers], references)
    assert found["rougeL"].tolist() == expected.tolist()
    assert found["stop_rate"].tolist() == [answer.stopped for answer in answers]
    assert numpy.isnan(found["facts_complete"]).tolist() == [False] * 3 + [True], "sample only"
    assert found["bytes"].tolist() == [len(text.encode()) for text in references]
