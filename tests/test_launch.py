"""Several processes: they learn what one learns, one of them writes, and each has its own GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import launched
import pytest
import torch
from safetensors.torch import load_file

from medquad_utils import CourseError, cli, generation, machine, profiles, quantization, training
from medquad_utils.machine import Hardware

CPU = Hardware("cpu", "any", 16.0, cores=2)
H100 = Hardware("cuda", "H100", 85.0, (9, 0), cores=26, gpus=8)
T4 = Hardware("cuda", "Tesla T4", 15.0, (7, 5), cores=2, gpus=1)
LOSS = 1e-4  # by which the loss of two processes may differ from that of one; measured: 5e-7
WEIGHT = 5e-5  # the same for a weight, the largest of which is 0.07; measured: 6e-6


def fsdp_environment() -> dict[str, str]:
    """What ``accelerate launch`` makes of the FSDP config that ships here."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    line = f"--config_file {training.CONFIGS['fsdp2']} --num_processes 2 -m medquad_utils.training"
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(line.split()))
    return {k: v for k, v in prepare_multi_gpu_env(options).items() if "FSDP" in k}


def torchrun(*jobs: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    fsdp = " ".join(f"{name}={value}" for name, value in fsdp_environment().items())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TEST_FSDP": fsdp}
    command += [launched.__file__, *jobs]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two launches of two processes; between them a copy of what a kill left; one process alone."""
    out = tmp_path_factory.mktemp("runs")
    first = torchrun(f"ddp:{out}/two", f"ddp-killed:{out}/killed")
    shutil.copytree(out / "killed", out / "left")
    sharded = f"{out}/sharded"
    jobs = (f"ddp:{out}/killed", f"fsdp-stopped:{sharded}", f"fsdp:{sharded}")
    second = torchrun(*jobs, f"fsdp-bf16:{out}/sharded16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "sft_config", launched.every_step)
        training.train(launched.small(out / "one", 1))
    return SimpleNamespace(folder=out, first=first, second=second)


def outcome(runs: Any, name: str) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """The losses with their steps, and the weights, of one run."""
    folder = runs.folder / name / "tiny"
    metrics = json.loads((folder / "metrics" / "train.json").read_text())
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    return metrics["train_curve"] + metrics["validation_curve"], weights


@pytest.mark.full
def test_fsdp2_in_bf16_reports_losses_in_fp32(runs: Any) -> None:
    """accelerate casts what a model returns, TRL's log-probabilities, to three digits."""
    (mine, _), (theirs, _) = outcome(runs, "one"), outcome(runs, "sharded16")
    losses = [loss for _, loss in theirs]
    # Two to four in bf16, which has steps of 1/64 there; validation's mean is over four rows.
    assert not any((256 * loss).is_integer() for loss in losses[launched.STEPS :])
    assert losses == pytest.approx([loss for _, loss in mine], rel=2e-3), "bf16 computes them"


@pytest.mark.full
@pytest.mark.parametrize("name", ["two", "sharded"], ids=["DDP", "FSDP2, stopped and resumed"])
def test_two_processes_learn_what_one_learns(runs: Any, name: str) -> None:
    (mine, one), (theirs, other) = outcome(runs, "one"), outcome(runs, name)
    assert len(mine) > launched.STEPS
    assert [step for step, _ in theirs] == [step for step, _ in mine]
    assert [loss for _, loss in theirs] == pytest.approx([loss for _, loss in mine], abs=LOSS)
    assert one.keys() == other.keys()
    assert max(float((other[key] - one[key]).abs().max()) for key in one) < WEIGHT
    assert max(float(weight.abs().max()) for weight in one.values()) > 100 * WEIGHT


@pytest.mark.full
def test_a_killed_run_of_two_processes_resumes_to_the_same_bits(runs: Any) -> None:
    assert runs.first.returncode != 0
    assert "ended with" not in runs.first.stdout  # the last job never came back
    left = runs.folder / "left" / "tiny"
    last = left / "checkpoints" / f"checkpoint-{launched.DIES_AT - 1}"
    assert training.last_checkpoint(last.parent, 2) == last
    assert not (left / "adapter").exists()
    assert runs.second.returncode == 0, runs.second.stderr
    assert runs.second.stdout.count("ended with [0, 1, 0, 0]") == 2
    (mine, killed), (theirs, whole) = outcome(runs, "killed"), outcome(runs, "two")
    assert mine == theirs
    assert all(torch.equal(killed[key], whole[key]) for key in whole)


@pytest.mark.full
def test_only_the_first_process_writes_and_prints(runs: Any) -> None:
    files = [p for name in ("two", "left") for p in (runs.folder / name).rglob("*") if p.is_file()]
    written = [p for p in files if p.suffix != ".safetensors"]  # their library sets permissions
    assert len(written) > 20
    foreign = {p.name for p in written if p.stat().st_mode & 0o077 == 0}
    assert foreign == {"rng_state_1.pth"}, "its own random state"
    lines = runs.first.stdout.splitlines()
    assert sum(line.startswith("profile ") for line in lines) == 2
    assert sum(line.startswith("{'steps': 4") for line in lines) == 1


@pytest.mark.full
def test_all_processes_end_when_the_first_one_fails(tmp_path: Path) -> None:
    done = torchrun(f"fails:{tmp_path}")
    assert done.stderr.count("medquad: the disk is full") == 1
    assert "process 1 made data" not in done.stderr, "process 0 failed, and it went on"
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left, "the locked folder alone is there"


@pytest.mark.full
def test_fsdp2_holds_half_of_the_4_bit_model_in_each_process(runs: Any) -> None:
    for done, expected in ((runs.second, 0.5), (runs.first, 1.0)):  # FSDP, DDP
        held = re.findall(r"process (\d) holds (\d+) of (\d+)", done.stdout)
        shares = {(rank, int(part) / int(whole)) for rank, part, whole in held}
        assert shares == {("0", expected), ("1", expected)}


def under(processes: int, patch: pytest.MonkeyPatch, rank: int = 0) -> None:
    """Set what a launcher sets."""
    patch.setenv("LOCAL_RANK", str(rank))
    patch.setenv("WORLD_SIZE", str(processes))


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(("name", "hardware"), [("tiny", CPU), ("llama-8b", H100)])
def test_a_step_is_as_large_on_several_processes_as_on_one(
    name: str, hardware: Hardware, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = profiles.resolve(name, hardware=hardware, out="runs")
    under(processes, monkeypatch)
    shared = profiles.resolve(name, hardware=hardware, out="runs")
    tokens = [
        plan.processes * plan.fit.accumulation * plan.fit.pack_length for plan in (alone, shared)
    ]
    assert tokens == [profiles.PROFILES[name].tokens_per_step] * 2
    assert alone.fit.max_length == shared.fit.max_length
    for field in ("learning_rate", "rows"):
        assert getattr(shared, field) == getattr(alone, field)


def test_a_step_that_cannot_be_shared_evenly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ("tiny", CPU, 3, "1, 2, 4"), ("llama-8b", H100, 16, "1, 2, 4, 8")
    for name, hardware, count, counts in cases:
        under(count, monkeypatch)
        said = f"{count} processes cannot share a step .* launch {counts}"
        with pytest.raises(CourseError, match=said):
            _ = profiles.resolve(name, hardware=hardware).fit
    monkeypatch.delenv("LOCAL_RANK")  # some clusters set WORLD_SIZE for every job
    assert profiles.resolve("tiny", hardware=CPU).processes == 1


def test_the_plan_names_the_command_for_several_gpus() -> None:
    for gpus, count in ((1, 0), (2, 2), (3, 2), (8, 8), (16, 8)):
        plan = profiles.resolve("llama-8b", hardware=dataclasses.replace(H100, gpus=gpus))
        command = f"torchrun --nproc_per_node {count} -m medquad_utils.training --profile llama-8b"
        assert plan.launch == (command if count else "")


def test_fsdp_stores_codes_in_the_compute_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = profiles.resolve("llama-8b", hardware=H100)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    cut = profiles.resolve("llama-8b", hardware=H100)
    storage = [quantization.nf4_config(plan).bnb_4bit_quant_storage for plan in (whole, cut)]
    assert storage == [torch.uint8, torch.bfloat16]
    assert [plan.optimizer for plan in (whole, cut)] == ["adamw_torch_fused", "adamw_torch"]
    assert profiles.resolve("llama-8b", hardware=T4).optimizer == "adamw_torch"
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert profiles.resolve("llama-8b", hardware=T4).optimizer == "paged_adamw_8bit"


def test_accelerate_reads_both_configs_that_ship(capsys: pytest.CaptureFixture[str]) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for name, kind in (("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")):
        assert cli.main(["train", "--print-launch", name]) == 0
        config = load_config_from_file(capsys.readouterr().out.strip())
        assert (config.distributed_type.value, config.mixed_precision) == (kind, "no")
    assert fsdp_environment()["FSDP_VERSION"] == "2"


def test_a_gpu_without_kernels_is_refused(set_gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, cuda, needed in (((6, 0), "12.8", "7.0"), ((7, 0), "13.0", "7.5")):
        set_gpus(1)
        card = SimpleNamespace(name="Tesla P100", major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n, card=card: card)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        said = rf"P100 has CUDA capability {capability[0]}.*need {needed}. Choose a newer GPU"
        with pytest.raises(CourseError, match=said):
            machine.detect()


@pytest.fixture
def set_gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace ``torch.cuda`` by that of a machine with so many GPUs, and no launcher."""
    for name in ("LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "MEDQUAD_GPUS"):
        monkeypatch.setenv(name, "")  # so that the environment is put back in any case
        monkeypatch.delenv(name)
    card = SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15_600_000_000)

    def make(gpus: int) -> None:
        fixed: list[int] = []  # CUDA reads the variable once, when it starts

        def count() -> int:
            listed = os.environ.get("CUDA_VISIBLE_DEVICES")
            return fixed[0] if fixed else gpus if listed is None else len(listed.split(","))

        monkeypatch.setattr(torch.cuda, "device_count", count)
        monkeypatch.setattr(
            torch.cuda, "is_available", lambda: fixed.append(count()) or count() > 0
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)

    return make


@pytest.mark.parametrize(
    ("gpus", "chosen", "found", "left"),
    [(0, None, 0, None), (1, None, 1, None), (4, None, 4, "0"), (8, "5,6", 2, "5")],
)
def test_without_a_launcher_one_gpu_is_left_visible(
    gpus: int, chosen: str | None, found: int, left: str | None, set_gpus: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    set_gpus(gpus)
    if chosen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert machine.detect().gpus == machine.detect().gpus == found
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left
    assert torch.cuda.device_count() == min(1, found), "as transformers counts: no DataParallel"


def test_each_process_takes_its_own_gpu(set_gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(2)
    machine.detect()  # in a notebook that starts the launcher
    set_gpus(2)
    under(2, monkeypatch, rank=1)
    assert machine.detect().gpus == 2
    load = Mock(return_value=(torch.nn.Linear(1, 1), {}))  # model and loading report
    monkeypatch.setattr(generation, "load_tokenizer", Mock())
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    generation.load_base(profiles.resolve("llama-8b", hardware=H100))
    assert load.call_args.kwargs["device_map"] == {"": 1}
    under(3, monkeypatch, rank=2)
    with pytest.raises(CourseError, match="process 2 has no GPU of its own: 2 visible"):
        machine.detect()


def test_cuda_that_has_started_on_several_gpus_is_refused(set_gpus: Any) -> None:
    set_gpus(2)
    torch.cuda.is_available()
    with pytest.raises(CourseError, match="Restart the kernel"):
        machine.detect()
