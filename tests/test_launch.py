"""More than one process: the same learning as one, one writer, kill and resume, and one GPU where there is no launcher."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import launched
import pytest
import torch
import yaml
from safetensors.torch import load_file

from medquad_utils import launch, profiles, training
from medquad_utils.profiles import CourseError, Hardware

CPU = Hardware("cpu", "any", 16.0, cores=2)
H100 = Hardware("cuda", "H100", 85.0, (9, 0), cores=26, gpus=8)
LOSS = 1e-4  # what the loss of two processes may differ by from that of one; measured: 5e-7
WEIGHT = 5e-5  # the same for a weight of the adapter, the largest of which is 0.07; measured: 6e-6


def fsdp_environment() -> dict[str, str]:
    """What ``accelerate launch`` makes of the config that ships here."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    line = ["--config_file", str(launch.config("fsdp2")), "--num_processes", "2", "-m", "medquad_utils.training"]
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(line))
    return {name: value for name, value in prepare_multi_gpu_env(options).items() if "FSDP" in name}


def torchrun(*jobs: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(Path(launched.__file__)), *jobs]
    fsdp = " ".join(f"{name}={value}" for name, value in fsdp_environment().items())
    changes = {"PYTHONPATH": str(Path(training.__file__).parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TEST_FSDP": fsdp}
    return subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, timeout=400)


@dataclasses.dataclass
class Runs:
    """What the launches left behind."""

    folder: Path
    first: subprocess.CompletedProcess[str]
    second: subprocess.CompletedProcess[str]

    def curve(self, name: str) -> dict[str, list[list[float]]]:
        metrics = json.loads((self.folder / name / "tiny" / "metrics" / "train.json").read_text())
        return {part: metrics[part] for part in ("train_curve", "validation_curve")}

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "tiny" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two launches of two processes; between them a copy of what a kill left, and one process alone."""
    folder = tmp_path_factory.mktemp("runs")
    first = torchrun(f"fails:{folder / 'failed'}", f"ddp:{folder / 'two'}", f"ddp-killed:{folder / 'killed'}")
    shutil.copytree(folder / "killed", folder / "left")
    second = torchrun(f"ddp:{folder / 'killed'}", f"fsdp-stopped:{folder / 'sharded'}", f"fsdp:{folder / 'sharded'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "sft_config", launched.every_step)
        training.train(launched.small(folder / "one", 1))
    return Runs(folder, first, second)


# ---- two processes ---------------------------------------------------------------------------------------------------


def assert_alike(runs: Runs, name: str) -> None:
    one, other = runs.curve("one"), runs.curve(name)
    for part in one:
        assert [step for step, _ in other[part]] == [step for step, _ in one[part]]
        assert [loss for _, loss in other[part]] == pytest.approx([loss for _, loss in one[part]], abs=LOSS)
    mine, theirs = runs.adapter("one"), runs.adapter(name)
    assert mine.keys() == theirs.keys()
    assert max(float((theirs[key] - mine[key]).abs().max()) for key in mine) < WEIGHT
    assert max(float(weight.abs().max()) for weight in mine.values()) > 100 * WEIGHT


def test_two_processes_learn_what_one_learns_from_the_same_step(runs: Runs) -> None:
    assert len(runs.curve("one")["train_curve"]) == launched.STEPS
    assert_alike(runs, "two")


def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(runs: Runs) -> None:
    assert runs.curve("killed") == runs.curve("two")
    killed, whole = runs.adapter("killed"), runs.adapter("two")
    assert all(torch.equal(killed[key], whole[key]) for key in whole)


def test_the_killed_run_was_killed_and_left_whole_checkpoints(runs: Runs) -> None:
    assert runs.first.returncode != 0
    assert "ended with" not in runs.first.stdout  # the last job never came back
    left = runs.folder / "left" / "tiny" / "checkpoints"
    assert training.last_checkpoint(left, 2) == left / f"checkpoint-{launched.DIES_AT - 1}"
    assert not (runs.folder / "left" / "tiny" / "adapter").exists()
    assert runs.second.returncode == 0, runs.second.stderr
    assert runs.second.stdout.count("ended with [0, 1, 0]") == 2


def test_only_the_first_process_writes_but_for_its_own_random_state(runs: Runs) -> None:
    written = [p for name in ("two", "left") for p in (runs.folder / name).rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    assert len(written) > 20
    assert {p.name for p in written if p.stat().st_mode & 0o077 == 0} == {"rng_state_1.pth"}


def test_only_the_first_process_prints(runs: Runs) -> None:
    lines = runs.first.stdout.splitlines()
    assert sum(line.startswith("profile ") for line in lines) == 3
    assert sum(line.startswith("{'steps': 4") for line in lines) == 1
    assert runs.first.stderr.count("medquad: the disk is full") == 1


def test_where_the_first_process_fails_the_others_stop_and_write_nothing(runs: Runs) -> None:
    assert "process 1 made data" not in runs.first.stderr
    assert not list((runs.folder / "failed").rglob("*"))


def test_another_number_of_processes_does_not_resume(runs: Runs) -> None:
    plan = launched.small(runs.folder / "left", 1)
    with pytest.raises(CourseError, match="processes was 2, now 1"):
        training.resumable(plan)
    assert training.last_checkpoint(plan.folder / "checkpoints", 2)


def test_a_checkpoint_without_every_random_state_is_torn(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(runs.folder / "left", tmp_path / "left")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = launched.small(tmp_path / "left", 2)
    newest = training.resumable(plan)
    assert newest is not None
    (newest / "rng_state_1.pth").unlink()
    older = training.resumable(plan)
    assert older == newest.with_name(f"checkpoint-{launched.DIES_AT - 2}")
    assert not newest.exists()


# ---- FSDP2: on CPUs once accelerate is told that they are GPUs --------------------------------------------------------


def test_fsdp2_holds_half_of_the_4_bit_model_in_each_process(runs: Runs) -> None:
    def shares(launch: subprocess.CompletedProcess[str]) -> list[tuple[str, float]]:
        held = re.findall(r"process (\d) holds (\d+) of (\d+)", launch.stdout)
        return sorted((rank, int(part) / int(whole)) for rank, part, whole in held)

    assert shares(runs.second) == [("0", 0.5), ("1", 0.5)]
    assert set(shares(runs.first)) == {("0", 1.0), ("1", 1.0)}  # DDP: all of it in each


def test_fsdp2_learns_what_one_process_learns_through_a_stop_and_a_resume(runs: Runs) -> None:
    assert_alike(runs, "sharded")


def test_fsdp_without_gpus_is_refused_since_accelerate_would_leave_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CourseError, match="FSDP needs GPUs"):
        launch.settings(profiles.resolve("tiny", hardware=CPU))


def test_fsdp_stores_4_bit_weights_in_the_dtype_of_the_others_and_takes_an_optimizer_that_can_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from medquad_utils.quantization import nf4_config

    plain = profiles.resolve("llama-8b", hardware=H100)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    cut = profiles.resolve("llama-8b", hardware=H100)
    assert [nf4_config(plan).bnb_4bit_quant_storage for plan in (plain, cut)] == [torch.uint8, torch.bfloat16]
    assert [plan.optimizer for plan in (plain, cut)] == ["paged_adamw_8bit", "adamw_torch"]


# ---- the configs and the command --------------------------------------------------------------------------------------


def test_accelerate_reads_both_configs_and_leaves_the_precision_to_the_plan() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert list(launch.CONFIGS) == ["ddp", "fsdp2"]
    for name, kind in (("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")):
        config = load_config_from_file(str(launch.config(name)))
        assert (config.distributed_type.value, config.mixed_precision) == (kind, "no")
    environment = fsdp_environment()
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    with pytest.raises(CourseError, match="expected ddp or fsdp2"):
        launch.config("deepspeed")


def test_both_configs_are_shipped(repo: Path) -> None:
    import tomllib

    shipped = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["medquad_utils"]
    assert all(any(path.relative_to(repo / "medquad_utils").match(glob) for glob in shipped) for path in launch.CONFIGS.values())


def test_the_command_prints_where_a_config_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(["--print-launch", "fsdp2"]) == 0
    assert yaml.safe_load(Path(capsys.readouterr().out.strip()).read_text())["fsdp_config"]["fsdp_version"] == 2


def test_the_command_has_an_option_for_each_parameter_of_the_notebook(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((repo / "notebooks" / "04_train_with_sft.ipynb").read_text())["cells"]
    (parameters,) = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    names = [node.targets[0].id for node in ast.parse(parameters).body if isinstance(node, ast.Assign)]  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        training.main(["--help"])
    shown = capsys.readouterr().out
    assert len(names) > 8
    assert [name for name in names if f"--{name.replace('_', '-')} " not in shown] == []


# ---- a step is cut evenly -------------------------------------------------------------------------------------------


def step(plan: profiles.Plan) -> int:
    """Tokens of one optimizer step over all processes."""
    return plan.processes * plan.accumulation * plan.pack_length


def under(processes: int, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("LOCAL_RANK", "0")
    patch.setenv("WORLD_SIZE", str(processes))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_global_step_stays_as_processes_grow(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {name: profiles.resolve(name, hardware=hardware) for name, hardware in (("tiny", CPU), ("llama-8b", H100))}
    under(processes, monkeypatch)
    for name, plan in alone.items():
        shared = profiles.resolve(name, hardware=CPU if plan.device == "cpu" else H100)
        assert shared.processes == processes
        assert step(shared) == step(plan)
        assert (shared.max_length, shared.learning_rate, shared.rows) == (plan.max_length, plan.learning_rate, plan.rows)


@pytest.mark.parametrize(("name", "hardware", "processes", "counts"), [("tiny", CPU, 3, "1, 2, 4"), ("llama-8b", H100, 16, "1, 2, 4, 8")])
def test_a_step_that_cannot_be_shared_evenly_is_refused(
    name: str, hardware: Hardware, processes: int, counts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    under(processes, monkeypatch)
    with pytest.raises(CourseError, match=f"{processes} processes cannot share a step .* launch {counts}"):
        profiles.resolve(name, hardware=hardware)


def test_world_size_without_a_launcher_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set it for every job
    assert profiles.resolve("tiny", hardware=CPU).processes == 1


@pytest.mark.parametrize(("gpus", "command"), [(1, None), (2, 2), (3, 2), (8, 8), (16, 8)])
def test_the_plan_says_what_to_run_instead_on_several_gpus(gpus: int, command: int | None) -> None:
    plan = profiles.resolve("llama-8b", hardware=dataclasses.replace(H100, gpus=gpus))
    rows = dict(plan.table())
    if command is None:
        assert "other GPUs" not in rows
    else:
        assert rows["other GPUs"].startswith(f"this process takes 1 of {gpus}")
        assert rows["other GPUs"].endswith(f"torchrun --nproc_per_node {command} -m medquad_utils.training --profile llama-8b")


# ---- one GPU where there is no launcher, on a made-up machine -----------------------------------------------------------


class Cuda:
    """``torch.cuda`` of a machine with GPUs: like CUDA it reads ``CUDA_VISIBLE_DEVICES`` once, when it starts."""

    def __init__(self, gpus: int) -> None:
        self.gpus, self.fixed = gpus, 0

    def device_count(self) -> int:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        return self.fixed or (self.gpus if listed is None else len([d for d in listed.split(",") if d]))

    def is_available(self) -> bool:
        self.fixed = self.device_count()
        return self.fixed > 0

    def get_device_properties(self, number: int) -> SimpleNamespace:
        assert number < self.fixed
        return SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15_600_000_000)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Cuda]:
    """A function that replaces ``torch.cuda`` by that of a machine with so many GPUs, and no launcher."""
    for name in ("LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "MEDQUAD_GPUS"):
        monkeypatch.setenv(name, "")  # so that the environment is put back however the test changes it
        monkeypatch.delenv(name)

    def make(gpus: int) -> Cuda:
        cuda = Cuda(gpus)
        for name in ("device_count", "is_available", "get_device_properties"):
            monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
        return cuda

    return make


def test_without_a_launcher_one_of_several_gpus_is_left_visible(machine: Callable[[int], Cuda]) -> None:
    cuda = machine(4)
    assert profiles.detect().gpus == 4
    assert torch.cuda.device_count() == cuda.fixed == 1  # what transformers counts: no DataParallel
    assert profiles.detect().gpus == 4  # asked again, it still knows
    assert "1 of 4" in dict(profiles.resolve("tiny").table())["other GPUs"]


def test_the_first_of_the_gpus_that_the_user_chose_is_taken(machine: Callable[[int], Cuda], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert profiles.detect().gpus == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.parametrize("gpus", [0, 1])
def test_with_no_choice_to_make_nothing_is_touched(gpus: int, machine: Callable[[int], Cuda]) -> None:
    machine(gpus)
    assert profiles.detect().gpus == gpus
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_launcher_started_from_a_notebook_sees_all_gpus_again(machine: Callable[[int], Cuda], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2)
    profiles.detect()
    machine(2)  # a process that torchrun starts, with the notebook's environment
    under(2, monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert profiles.detect().gpus == 2
    assert profiles.resolve("tiny", hardware=dataclasses.replace(H100, gpus=2)).processes == 2


def test_more_processes_than_gpus_are_refused(machine: Callable[[int], Cuda], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(CourseError, match="process 2 has no GPU of its own: 2 visible"):
        profiles.detect()


def test_cuda_that_has_started_on_several_gpus_is_refused(machine: Callable[[int], Cuda]) -> None:
    machine(2).is_available()
    with pytest.raises(CourseError, match="Restart the kernel"):
        profiles.detect()


def test_each_process_loads_the_model_onto_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from medquad_utils import generation

    asked = {}

    def load(source: str, **options: object) -> torch.nn.Module:
        asked.update(options)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setenv("LOCAL_RANK", "3")
    generation.load_base(profiles.resolve("llama-8b", hardware=H100))
    assert asked["device_map"] == {"": 3}
