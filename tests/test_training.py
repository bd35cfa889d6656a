"""The SFT run: what the trainer is given, what a step changes, and what survives a kill, a full disk or a NaN."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from medquad_utils import chat, data, generation, lora, profiles, training
from medquad_utils.profiles import CourseError, Hardware, Plan

CPU = Hardware("cpu", "any", 16.0, cores=2)
T4 = Hardware("cuda", "Tesla T4", 15.6, (7, 5), gpus=1)
A100 = Hardware("cuda", "NVIDIA A100", 42.4, (8, 0), gpus=1)


def small_plan(out: Path, **changes: Any) -> Plan:
    """The embedded model on 14 rows, packed into four of 256 tokens, two a step: two steps an epoch, three epochs."""
    plan = profiles.resolve("tiny", hardware=CPU, out=str(out), rows=14)
    return dataclasses.replace(plan, **{"pack_length": 256, "accumulation": 2, "eval_rows": 4, "epochs": 3, **changes})


def prepared(plan: Plan) -> tuple[Any, data.Splits, Any]:
    """Tokenizer, the rows of the plan, and a trainer that is ready to run."""
    tokenizer = generation.load_tokenizer(plan)
    rows = training.select(plan, tokenizer, data.prepare(plan))
    return tokenizer, rows, training.build_trainer(plan, generation.load_base(plan), tokenizer, rows)


def frozen_bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every frozen weight, with the scales of the 4-bit ones."""
    bits = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            bits[name] = parameter.detach().clone()
            if (state := getattr(parameter, "quant_state", None)) is not None:
                bits[name + ".absmax"] = state.absmax.clone()
                bits[name + ".absmax2"] = state.state2.absmax.clone()
    return bits


@dataclasses.dataclass
class Run:
    """A trainer that ran for four steps, and what was seen of it before."""

    plan: Plan
    tokenizer: Any
    rows: data.Splits
    trainer: Any
    preflight: list[tuple[str, str, bool]]
    frozen: dict[str, torch.Tensor]
    untrained_b: dict[str, float]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = small_plan(tmp_path_factory.mktemp("run"), max_steps=4)
    tokenizer, rows, trainer = prepared(plan)
    before = Run(
        plan, tokenizer, rows, trainer, training.preflight(plan, tokenizer, rows.train, trainer),
        frozen_bits(trainer.model), lora.lora_b_norms(trainer.model),
    )  # fmt: skip
    trainer.train()
    return before


# ---- what the trainer is given --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "bf16", "fp16"),
    [(CPU, False, False), (dataclasses.replace(CPU, bf16_cpu=True), True, False), (T4, False, True), (A100, True, False)],
    ids=["cpu", "cpu with avx512-bf16", "t4", "a100"],
)
def test_precision_flags_follow_the_plan_and_are_never_left_to_the_default(
    hardware: Hardware, bf16: bool, fp16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = profiles.resolve("tiny", hardware=hardware, out=str(tmp_path))
    # TrainingArguments asks the machine whether it has bf16; the plan is for another machine than the one that tests it
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    config = training.sft_config(plan)
    assert (config.bf16, config.fp16) == (bf16, fp16)
    assert not (config.bf16 and config.fp16)


def test_adapters_have_the_plans_dtype_although_trl_casts_them_to_bf16(run: Run, tmp_path: Path) -> None:
    from trl import SFTTrainer

    bare = SFTTrainer(
        model=generation.load_base(run.plan),
        args=training.sft_config(run.plan, tmp_path),
        train_dataset=chat.to_dataset(run.rows.train),
        eval_dataset=chat.to_dataset(run.rows.validation),
        processing_class=run.tokenizer,
        peft_config=lora.lora_config(run.plan),
    )
    assert list(lora.dtype_census(bare.model)["trained"]) == ["bfloat16"]
    assert run.plan.adapter_dtype == "float32"
    assert list(lora.dtype_census(run.trainer.model)["trained"]) == ["float32"]


def test_adapters_start_as_no_change_at_all(run: Run) -> None:
    assert run.untrained_b
    assert set(run.untrained_b.values()) == {0.0}


def test_trls_own_labels_equal_those_that_the_lesson_shows(run: Run) -> None:
    shown = sorted((list(e.ids), list(e.labels)) for e in chat.encode_all(run.tokenizer, run.rows.train))
    assert sorted((ids.tolist(), labels.tolist()) for ids, labels in training._documents(run.trainer, len(run.rows.train))) == shown


def test_preflight_is_all_right_on_the_sample(run: Run) -> None:
    assert len(run.preflight) >= 8
    assert [what for what, _, right in run.preflight if not right] == []
    training.require(run.preflight)


def test_preflight_refuses_a_pad_token_that_ends_the_turn(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    tokenizer = generation.load_tokenizer(plan)
    rows = training.select(plan, tokenizer, data.prepare(plan))
    tokenizer.pad_token = chat.END_OF_TURN
    trainer = training.build_trainer(plan, generation.load_base(plan), tokenizer, rows)
    checks = training.preflight(plan, tokenizer, rows.train, trainer)
    assert "pad is no end token" in [what for what, _, right in checks if not right]
    with pytest.raises(CourseError, match="pad is no end token"):
        training.require(checks)


def packed_trainer(run: Run, spoil: Any = None) -> Any:
    """A trainer stand-in whose rows are packed by TRL's own collator, three examples to a row."""
    from types import SimpleNamespace

    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [chat.encode(run.tokenizer, row) for row in run.rows.train[:12]]
    rows = [spoil(e) if spoil and n == 5 else e for n, e in enumerate(rows)]
    packs = [rows[i : i + 3] for i in range(0, 12, 3)]
    features = [
        {
            "input_ids": [i for e in pack for i in e.ids],
            "labels": [i for e in pack for i in e.labels],
            "seq_lengths": [len(e.ids) for e in pack],
        }
        for pack in packs
    ]
    collator = DataCollatorForLanguageModeling(pad_token_id=run.tokenizer.pad_token_id, padding_free=True)
    return SimpleNamespace(train_dataset=features, data_collator=collator, model=run.trainer.model)


def test_preflight_looks_into_packed_rows_example_by_example(run: Run) -> None:
    found = {what: (text, right) for what, text, right in training.preflight(run.plan, run.tokenizer, run.rows.train, packed_trainer(run))}
    assert found["BOS tokens per example"] == ("1 in each of 12", True)
    assert found["end tokens in the loss per answer"] == ("1 in each of 12", True)


@pytest.mark.parametrize(
    ("spoil", "what", "text"),
    [
        (lambda e: chat.Encoded([e.ids[0], *e.ids], [chat.IGNORED, *e.labels]), "BOS tokens per example", "1 in 11, 2 in 1"),
        (lambda e: chat.Encoded(e.ids[:-1], e.labels[:-1]), "end tokens in the loss per answer", "0 in 1, 1 in 11"),
        (lambda e: chat.Encoded([*e.ids, e.ids[-1]], [*e.labels, e.labels[-1]]), "end tokens in the loss per answer", "1 in 11, 2 in 1"),
        (lambda e: chat.Encoded([*e.ids, 5], [*e.labels, 5]), "pad tokens in the loss", "1"),
    ],
    ids=["two BOS", "no end of turn", "two ends of turn", "a pad is learned"],
)
def test_preflight_finds_the_one_bad_example_of_twelve(run: Run, spoil: Any, what: str, text: str) -> None:
    assert run.tokenizer.pad_token_id == 5
    checks = training.preflight(run.plan, run.tokenizer, run.rows.train, packed_trainer(run, spoil))
    assert [(w, t) for w, t, right in checks if not right] == [(what, text)]


def test_select_leaves_out_rows_that_are_too_long_and_cuts_none(run: Run) -> None:
    splits = data.prepare(run.plan)
    lengths = {row["question"]: len(chat.encode(run.tokenizer, row).ids) for row in splits.train}
    limit = sorted(lengths.values())[len(lengths) // 2]
    chosen = training.select(dataclasses.replace(run.plan, rows=0, max_length=limit), run.tokenizer, splits)
    expected = {question for question, length in lengths.items() if length <= limit}
    assert {row["question"] for row in chosen.train} == expected
    assert 0 < len(expected) < len(lengths)
    by_question = {row["question"]: row["answer"] for row in splits.train}
    assert all(row["answer"] == by_question[row["question"]] for row in chosen.train)


def test_select_says_so_when_no_row_fits(run: Run) -> None:
    with pytest.raises(CourseError, match="fits into 8 tokens"):
        training.select(dataclasses.replace(run.plan, max_length=8), run.tokenizer, data.prepare(run.plan))


# ---- what a few steps change ----------------------------------------------------------------------------------------


def test_every_adapter_learns_and_the_loss_is_finite(run: Run) -> None:
    norms = lora.lora_b_norms(run.trainer.model)
    assert len(norms) == 7 * run.trainer.model.config.num_hidden_layers
    assert [name for name, norm in norms.items() if not norm > 0] == []
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    losses += [entry["eval_loss"] for entry in run.trainer.state.log_history if "eval_loss" in entry]
    assert run.trainer.state.global_step == 4
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


def test_frozen_weights_are_bit_identical_after_training(run: Run) -> None:
    after = frozen_bits(run.trainer.model)
    assert after.keys() == run.frozen.keys()
    assert any(name.endswith(".absmax2") for name in after), "no 4-bit weight among them"
    assert [name for name in after if not torch.equal(after[name], run.frozen[name])] == []


def test_a_nan_loss_stops_the_run_at_the_next_log(tmp_path: Path) -> None:
    """transformers hides a NaN from the log unless told not to: the run would go on for hours and save rubbish."""
    *_, trainer = prepared(small_plan(tmp_path))
    trainer.args.logging_steps = 1
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if name.endswith("norm.weight")).fill_(float("nan"))
    with pytest.raises(CourseError, match=r"loss is nan at step 1.*learning rate"):
        trainer.train()


def test_an_adapter_that_does_not_move_stops_the_run_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation checkpointing without gradients of the inputs trains nothing, while the loss of the other layers falls."""
    monkeypatch.setattr(training, "WATCHED", 2)
    *_, trainer = prepared(small_plan(tmp_path))
    name, stuck = next((n, p) for n, p in trainer.model.named_parameters() if ".lora_B." in n)
    stuck.register_hook(torch.zeros_like)
    with pytest.raises(CourseError, match=rf"1 adapters did not learn.*{name.split('.')[-4]}.*gradients do not reach"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_run_of_two_steps_has_its_losses_and_its_adapter(tmp_path: Path) -> None:
    metrics = training.train(small_plan(tmp_path, max_steps=2))
    assert [step for step, _ in metrics["train_curve"]] == [1]
    assert [step for step, _ in metrics["validation_curve"]] == [2]
    assert metrics["loss_first"] == metrics["loss_last"] == round(metrics["train_curve"][0][1], 4)


def test_a_run_is_saved_ten_times_and_after_each_validation(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, rows=12, pack_length=128, accumulation=1, epochs=2)  # 8 steps an epoch, 16 in all: every second step
    *_, trainer = prepared(plan)
    saved: list[tuple[int, int]] = []

    class Note(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved.append((state.global_step, sum("eval_loss" in e for e in state.log_history)))

    trainer.add_callback(Note())
    trainer.train()
    assert saved == [(2, 0), (4, 0), (6, 0), (8, 1), (10, 1), (12, 1), (14, 1), (16, 2)]


def test_finish_refuses_adapters_that_learned_nothing_or_nonsense(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    *_, trainer = prepared(plan)
    with pytest.raises(CourseError, match=r"28 adapters did not learn.*enable_input_require_grads"):
        training.finish(plan, trainer, 0.0)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(float("nan"))
    with pytest.raises(CourseError, match=r"28 adapters hold NaN.*learning rate"):
        training.finish(plan, trainer, 0.0)
    assert not (plan.folder / "adapter").exists()


# ---- kill and resume ------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import Trainer, TrainerCallback
sys.path.insert(0, sys.argv[1])
from test_training import small_plan
from medquad_utils import training

out, step, when = sys.argv[2:]

def kill(state):
    if state.global_step == int(step):
        os.kill(os.getpid(), signal.SIGKILL)

class Kill(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if when == "after the save":
            kill(state)

    def on_step_end(self, args, state, control, **kwargs):
        if when == "after the step":
            kill(state)

def save_rng_state(self, folder):
    kill(self.state)

if when == "in the save":
    Trainer._save_rng_state = save_rng_state
watch = training.watch

def watch_and_kill(trainer):
    watch(trainer)
    trainer.add_callback(Kill())

training.watch = watch_and_kill
training.train(small_plan(Path(out)))
"""


def kill_at(out: Path, step: int, when: str) -> Path:
    """The ``out`` folder of a run of six steps that was killed with SIGKILL."""
    root = str(Path(training.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(out), str(step), when]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    return out


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the steps that the next ``training.train`` really does."""
    steps: list[int] = []
    build = training.build_trainer

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    def build_and_watch(*args: Any, **kwargs: Any) -> Any:
        trainer = build(*args, **kwargs)
        trainer.add_callback(Watch())
        return trainer

    monkeypatch.setattr(training, "build_trainer", build_and_watch)
    return steps


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, as in the killed process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = small_plan(tmp_path_factory.mktemp("whole"))
    training.train(plan)
    torch.set_num_threads(threads)
    return plan


@pytest.mark.parametrize(
    ("step", "when", "left"),
    [(1, "after the step", []), (3, "after the save", [4, 5, 6]), (5, "in the save", [5, 6])],
    ids=["before the first save", "in the middle of an epoch", "in the middle of a save"],
)
def test_a_killed_run_goes_on_and_ends_bit_equal_to_an_uninterrupted_one(
    step: int, when: str, left: list[int], uninterrupted: Plan, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = small_plan(kill_at(tmp_path, step, when))
    left = left or [1, 2, 3, 4, 5, 6]
    folders = sorted(p.name for p in resumed.folder.glob("checkpoints/checkpoint-*"))
    found = training.resumable(resumed)
    assert (found.name if found else None) == (f"checkpoint-{left[0] - 1}" if left[0] > 1 else None)
    assert not (resumed.folder / "adapter").exists()
    if when == "in the save":
        assert folders[-1] == "checkpoint-5", "the trainer was to die in the middle of writing it"
        assert not (resumed.folder / "checkpoints" / "checkpoint-5").exists(), "a torn checkpoint is as good as none"
    seen_before_the_kill = json.loads((found / "trainer_state.json").read_text())["log_history"] if found else []

    steps = watch_steps(monkeypatch)
    after = training.train(resumed)
    assert steps == left, "it began again instead of going on, or the other way round"
    whole = json.loads((uninterrupted.folder / "metrics" / "train.json").read_text())
    one, other = (load_file(p.folder / "adapter" / "adapter_model.safetensors") for p in (resumed, uninterrupted))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert after["validation_curve"] == [(step, loss) for step, loss in whole["validation_curve"]]
    assert [step for step, _ in after["validation_curve"]] == [2, 4, 6]
    seen = [(e["step"], e["eval_loss"]) for e in seen_before_the_kill if "eval_loss" in e]
    assert after["validation_curve"][: len(seen)] == seen
    assert json.loads((resumed.folder / "metrics" / "train.json").read_text())["steps"] == 6
    assert not list(resumed.folder.glob("checkpoints/checkpoint-*")), "a finished run leaves nothing to resume"


def test_a_checkpoint_of_another_plan_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    checkpoint = plan.folder / "checkpoints" / "checkpoint-2"
    assert training.resumable(plan) is None
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    assert training.resumable(plan) == checkpoint
    with pytest.raises(CourseError, match=r"lora_r was 16, now 8.*Delete the folder"):
        training.resumable(dataclasses.replace(plan, lora_r=8))
    assert training.resumable(plan) == checkpoint, "the refusal must not make the other plan the owner"
    moved = dataclasses.replace(plan, hardware="another machine", why="auto", card_gb=99.0)
    assert training.resumable(moved) == checkpoint


def test_a_half_written_checkpoint_is_ignored(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(tmp_path, max_steps=1)
    *_, trainer = prepared(plan)
    folder = plan.folder / "checkpoints"

    def cut_off(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_rng_state", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert list(folder.glob("checkpoint-1/adapter_model.safetensors")), "the trainer was to stop in the middle of saving"
    assert training.last_checkpoint(folder) is None

    for step in (9, 10, 100):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step"' if step == 100 else "{}")
    assert training.last_checkpoint(folder) == folder / "checkpoint-10"
    (folder / "checkpoint-9" / "rng_state_0.pth").touch()
    (folder / "checkpoint-9" / "rng_state_1.pth").touch()
    assert training.last_checkpoint(folder, processes=2) == folder / "checkpoint-9", "of the second process a state is missing in the other"


# ---- the adapter on the disk ----------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("limit", [2_000, 200_000], ids=["first file", "weights"])
def test_a_full_disk_keeps_the_older_adapter_whole(run: Run, limit: int) -> None:
    """A file-size limit is the disk: the operating system itself refuses the write in the middle of a file."""
    resource = pytest.importorskip("resource", reason="needs POSIX file-size limits: run the tests on Linux or macOS")
    folder = training.save_adapter(run.plan, run.trainer)
    before = contents(run.plan.folder)
    assert {"adapter/adapter_model.safetensors", "adapter/tokenizer.json", "adapter/plan.json"} <= before.keys()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(CourseError, match=r"cannot save the adapter: .*untouched"):
            training.save_adapter(run.plan, run.trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert contents(run.plan.folder) == before
    assert folder.is_dir()


def test_an_error_after_the_weights_keeps_the_older_adapter_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    training.save_adapter(run.plan, run.trainer)
    before = contents(run.plan.folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.trainer.processing_class, "save_pretrained", full)
    with pytest.raises(CourseError, match="No space left on device"):
        training.save_adapter(run.plan, run.trainer)
    assert contents(run.plan.folder) == before


def test_a_saved_adapter_replaces_the_older_one_whole(run: Run) -> None:
    folder = training.save_adapter(run.plan, run.trainer)
    (folder / "left over from an older run").touch()
    training.save_adapter(run.plan, run.trainer)
    assert not (folder / "left over from an older run").exists()
    assert sorted(p.name for p in folder.parent.iterdir() if "adapter" in p.name) == ["adapter"]
    saved = load_file(folder / "adapter_model.safetensors")
    held = {name: p for name, p in run.trainer.model.named_parameters() if ".lora_" in name}
    assert len(saved) == len(held)
    assert all(torch.equal(saved[name.replace(".default", "")], p.detach()) for name, p in held.items())
    assert json.loads((folder / "plan.json").read_text())["model_id"] == "embedded"
