"""The training benchmark feeds every arm the same rows, counts what it says it counts, and its page says what was measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import BENCHMARKS, benchmark

from medquad_utils.profiles import PROFILES, CourseError, Hardware, Plan, Shape

CPU = Hardware("cpu", "CPU", 24, cores=2)
T4 = Hardware("cuda", "T4", 15, (7, 5), gpus=1)


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    module: ModuleType = benchmark("train_speed")
    return module


@pytest.fixture(scope="module")
def table(speed: ModuleType) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(speed.LENGTHS.read_text(encoding="utf-8"))
    return made


@pytest.fixture(scope="module")
def devices(speed: ModuleType) -> dict[str, Any]:
    made: dict[str, Any] = speed.read_results(speed.RESULTS)
    return made


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_the_length_table_is_numbers_of_the_whole_of_medquad(table: dict[str, Any]) -> None:
    assert table["rows"] == 13_335
    assert set(table) == {"tokenizer", "rows", "prompt", "answer"}
    for part in ("prompt", "answer"):
        assert len(table[part]) == 101
        assert table[part] == sorted(table[part])


def test_the_length_table_is_what_the_rows_of_a_folder_have(speed: ModuleType, medquad_xml: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from medquad_utils import chat, cleaning, data
    from medquad_utils.profiles import TINY_MODEL

    folder = tmp_path / "9_CDC_QA"
    folder.mkdir()
    for file in sorted((medquad_xml / "9_CDC_QA").glob("*.xml"))[:3]:
        (folder / file.name).write_bytes(file.read_bytes())
    made = speed.measure_lengths(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    rows = cleaning.clean(data.load_xml(tmp_path).rows)[0]
    encoded = [chat.encode(tokenizer, row) for row in rows]
    answers = sorted(sum(e.in_loss) for e in encoded)
    prompts = sorted(e.in_loss.index(True) for e in encoded)
    assert made["rows"] == len(rows) > 3
    assert (made["answer"][0], made["answer"][100]) == (answers[0], answers[-1])
    assert (made["prompt"][0], made["prompt"][100]) == (prompts[0], prompts[-1])
    assert set(made["answer"]) <= set(answers)


def test_drawn_lengths_follow_the_table_and_keep_within_the_limit(speed: ModuleType) -> None:
    even = {"prompt": [10] * 101, "answer": list(range(0, 303, 3))}
    drawn = speed.draw_lengths(even, 4000, 1000)
    assert {prompt for prompt, _ in drawn} == {10}
    answers = sorted(answer for _, answer in drawn)
    assert answers[2000] == pytest.approx(150, abs=10)
    assert answers[400] == pytest.approx(30, abs=10)
    assert drawn == speed.draw_lengths(even, 4000, 1000), "seeded"
    assert drawn != speed.draw_lengths(even, 4000, 1000, seed=1)
    short = speed.draw_lengths(even, 500, 60)
    assert max(map(sum, short)) == 60, "the limit itself is allowed"
    with pytest.raises(CourseError, match="no row of the length table fits into 9 tokens"):
        speed.draw_lengths(even, 1, 9)


def test_a_row_has_the_lengths_asked_for_its_prompt_masked_and_no_other_ids(speed: ModuleType) -> None:
    first, second = speed.make_rows([(2, 3), (1, 1)], [7, 8, 9])
    assert len(first["input_ids"]) == len(first["labels"]) == 5
    assert first["labels"][:2] == [-100, -100]
    assert first["labels"][2:] == first["input_ids"][2:]
    assert second["labels"][0] == -100 != second["labels"][1]
    assert {*first["input_ids"], *second["input_ids"]} <= {7, 8, 9}


def test_every_arm_measures_the_same_rows_after_a_step_of_its_own(speed: ModuleType, table: dict[str, Any]) -> None:
    plan = speed.plan_for("tiny", hardware=CPU)
    drawn = {arm: speed.drawn_rows(plan, plan, arm, table, 2) for arm in "abcd"}
    sizes = {arm: len(first) for arm, (first, _) in drawn.items()}
    ours = sizes.pop("c")
    assert sizes == {"a": 4, "b": 8, "d": 8}
    assert all(rows == drawn["c"][1] for _, rows in drawn.values())
    assert len(drawn["c"][1]) == 2 * ours
    assert max(len(row["input_ids"]) for _, rows in drawn.values() for row in rows) <= 512
    with pytest.raises(CourseError, match=r"Lower --steps"):
        speed.drawn_rows(plan, plan, "a", table, 1000)


def test_rows_of_a_packed_step_are_its_tokens_over_the_mean(speed: ModuleType) -> None:
    plan = speed.plan_for("llama-8b", hardware=speed.H200)
    assert plan.packing
    assert speed.rows_per_step(plan, 256) == plan.pack_length * plan.accumulation / 256
    padded = dataclasses.replace(plan, pack_length=0, batch_size=4, accumulation=3)
    assert speed.rows_per_step(padded, 256) == 12


# ---- what each arm is -----------------------------------------------------------------------------------------------


def test_the_arms_are_what_the_page_says(speed: ModuleType) -> None:
    plan = speed.plan_for("llama-8b", hardware=speed.H200)
    config, adapter = speed.upstream_settings(plan)
    assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] == speed.step_rows("a", plan, 1)
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"], adapter["target_modules"]) == (
        8,
        16,
        0.2,
        ["q_proj", "k_proj", "v_proj"],
    )
    config, adapter = speed.default_settings(plan)
    assert config == {}, "left alone"
    assert (adapter["r"], len(adapter["target_modules"])) == (plan.lora_r, 7)
    assert "per_device_train_batch_size" not in speed.HARNESS
    assert "activation_checkpointing" not in speed.HARNESS


def test_trls_defaults_are_still_what_the_page_says(speed: ModuleType, tmp_path: Path) -> None:
    from trl import SFTConfig

    config = SFTConfig(output_dir=str(tmp_path), **speed.HARNESS)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == speed.step_rows(
        "b", speed.plan_for("tiny", hardware=CPU), 1
    )
    assert config.bf16
    assert config.activation_checkpointing
    assert not config.packing
    assert config.max_length >= speed.MAX_LENGTH, "no arm cuts a row"


def test_the_plans_of_a_cpu_an_h200_and_a_t4(speed: ModuleType) -> None:
    cpu, h200, t4 = (
        speed.plan_for("tiny", hardware=CPU),
        speed.plan_for("llama-8b", hardware=speed.H200),
        speed.plan_for("llama-8b", hardware=T4),
    )
    assert (cpu.compute_dtype, cpu.adapter_dtype, cpu.max_length) == ("float32", "float32", 512)
    assert (h200.compute_dtype, h200.adapter_dtype, h200.batch_size, h200.checkpointing) == ("bfloat16", "bfloat16", 1, False)
    assert (t4.compute_dtype, t4.adapter_dtype, t4.batch_size) == ("float16", "float32", 1)
    assert h200.packing
    assert t4.packing
    assert t4.pack_length >= speed.MAX_LENGTH, "no row is split"
    assert speed.plan_for("tiny", hardware=CPU, most=128).max_length == 128


def test_each_lever_moves_one_thing_and_each_group_has_ours_at_most_once(speed: ModuleType) -> None:
    for plan in (speed.plan_for("tiny", hardware=CPU), speed.plan_for("llama-8b", hardware=speed.H200)):
        for lever in speed.LEVERS:
            changes = lever.plan(plan)
            moved = dataclasses.replace(plan, **changes)
            assert lever.why
            if lever.ours(plan):
                assert moved == plan, f"{lever.setting} is said to be ours"
            if changes and not lever.ours(plan) and lever.setting not in ("padding-free", "one at a time"):
                assert lever.ours(moved), f"{lever.setting} is not what it sets"
        counts = [
            sum(lever.ours(plan) for lever in speed.LEVERS if lever.group == group) for group in {lever.group for lever in speed.LEVERS}
        ]
        assert max(counts) == 1
    h200 = speed.plan_for("llama-8b", hardware=speed.H200)
    for padded in (lever.plan(h200) for lever in speed.LEVERS if lever.setting in ("padded", "one at a time")):
        moved = dataclasses.replace(h200, **padded)
        assert speed.rows_per_step(moved, 256) == speed.rows_per_step(h200, 256), "as many rows a step, at half of max_length a row"


def test_a_cap_without_a_gpu_and_unsloth_without_unsloth_say_why(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CourseError, match="expected a CUDA GPU"):
        speed.capped(15)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CourseError, match="unsloth is not installed"):
        speed.build("d", speed.plan_for("tiny", hardware=CPU), [])


# ---- counting -------------------------------------------------------------------------------------------------------


def test_flops_of_llama_8b_by_hand(speed: ModuleType) -> None:
    blocks = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    weights = blocks + 128_256 * 4096
    shape = PROFILES["llama-8b"].shape
    assert speed.flops_per_token(shape) == 4 * weights
    assert speed.flops_per_token(shape) / 1e9 == pytest.approx(30.0, abs=0.05)
    assert speed.flops_per_token(shape, 1) == 4 * weights + 2 * blocks
    assert speed.flops_per_token(shape, 1) / 1e9 == pytest.approx(44.0, abs=0.05)


def test_pads_are_computed_and_not_real() -> None:
    speed = sys.modules["train_speed"]
    padded = {"input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [4, 4, 4, 4]]), "attention_mask": torch.ones(3, 4)}
    assert speed.count(padded, pad=0) == (9, 12, 3)
    packed = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 0]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}
    assert speed.count(packed, pad=0) == (5, 6, 2), "the pad at the end begins no row"


def test_figures_by_hand(speed: ModuleType) -> None:
    shape = Shape(4, 1, 8, 2, 2, 10, tied=True)  # blocks 4 x 16 + 3 x 32 = 160, head 40: 800 FLOP a token, 1,120 with a second forward pass
    steps = [{"seconds": 99.0, "real": 1, "computed": 1, "rows": 1}] + 2 * [{"seconds": 2.0, "real": 60, "computed": 80, "rows": 5}]
    found = speed.figures({"steps": steps, "recomputed": 1.0, "rows": 8, "row_tokens": 80}, shape, 1e5)
    assert found == {
        "measured_steps": 2, "rows": 10, "tokens_per_s": 30, "rows_per_s": 3, "seconds_per_step": 2, "seconds_per_row": round(1 / 3, 5),
        "pads": 0.25, "mfu_4n": 30 * 800 / 1e5, "mfu_executed": 40 * 1120 / 1e5,
    }  # fmt: skip
    assert speed.figures({"error": "no"}, shape, 1e5) == {}
    other = {"figures": {"tokens_per_s": 2.0, "seconds_per_row": 5.0}, "against": 8.0, "rows": 3, "row_tokens": 30}
    ours = {"figures": {"tokens_per_s": 99.0}}  # the middle of all runs of ours: a ratio is taken against its neighbours
    assert speed.ratios({"a": other, "b": {"error": "x", "figures": {}}, "c": ours}) == {"tokens_per_s c/a": 4, "seconds_per_row a/c": 4}
    runs = [{"figures": {"tokens_per_s": rate}} for rate in (5, 9, 1, 7)]
    assert speed.median_run([*runs, {"figures": {}}])["figures"]["tokens_per_s"] == 5
    assert speed.median_run([{"figures": {}, "error": "no"}])["error"] == "no"


def test_an_error_is_shown_by_its_first_line_without_paths(speed: ModuleType) -> None:
    assert speed.first_line(ValueError("\n no file in /home/ann/x/y.py | here\nmore")) == "no file in (path) / here"
    assert speed.first_line(ValueError()) == "ValueError"
    assert speed.spawn({"arm": "c"}, 60)["error"] == "'cap_gb'", "what fails in the arm's process comes back as its result"


def smoke(speed: ModuleType, table: dict[str, Any], tmp_path: Path, packed: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    plan = dataclasses.replace(
        speed.plan_for("tiny", hardware=CPU, most=96), out=str(tmp_path), pack_length=0, batch_size=4, accumulation=1
    )
    moved = dataclasses.replace(plan, pack_length=192, batch_size=1, accumulation=2) if packed else plan
    first, rows = speed.drawn_rows(plan, moved, "c", table, 1)
    trainer = speed.build("c", moved, [*first, *rows])
    from medquad_utils.generation import load_tokenizer

    return speed.train(trainer, load_tokenizer(plan).pad_token_id), [*first, *rows]


@pytest.mark.parametrize("packed", [False, True])
def test_two_steps_of_ours_count_every_real_token_once(speed: ModuleType, table: dict[str, Any], tmp_path: Path, packed: bool) -> None:
    made, rows = smoke(speed, table, tmp_path, packed)
    assert sum(step["real"] for step in made["steps"]) == sum(len(row["input_ids"]) for row in rows)
    assert sum(step["rows"] for step in made["steps"]) == len(rows)
    pads = sum(step["computed"] - step["real"] for step in made["steps"])
    assert (pads == 0) is packed
    assert len(made["steps"]) >= 2
    assert made["idle_adapters"] == 0
    assert made["adapter_dtype"] == "float32"
    assert made["recomputed"] == 0
    assert made["peak_gb"] >= made["loaded_gb"] > 0
    assert all(0 < loss < 50 for loss in made["loss"])


# ---- what is written ------------------------------------------------------------------------------------------------


def test_the_json_was_measured_side_by_side_on_the_plan_of_today(speed: ModuleType, devices: dict[str, Any]) -> None:
    run = devices["cpu"]["tiny"]
    assert {"a", "b", "c", "d"} == set(run["arms"])
    ran = [made for made in run["arms"].values() if made["figures"]]
    assert len({(made["rows"], made["row_tokens"]) for made in ran}) == 1, "the same rows in every arm"
    assert run["arms"]["b"]["trainable"] == run["arms"]["c"]["trainable"], "the same rank"
    assert all(made["idle_adapters"] == 0 for made in ran)
    plan = speed.plan_for("tiny", hardware=CPU)
    same = (
        "compute_dtype",
        "adapter_dtype",
        "batch_size",
        "accumulation",
        "pack_length",
        "checkpointing",
        "attention",
        "optimizer",
        "lora_r",
    )
    assert {name: run["plan"][name] for name in same} == {name: getattr(plan, name) for name in same}, "measure again: the plan has changed"
    levers = [(entry["group"], entry["setting"], entry.get("ours", False)) for entry in run["levers"]]
    assert levers == [(lever.group, lever.setting, lever.ours(plan)) for lever in speed.LEVERS]


def test_figures_and_ratios_follow_from_the_steps(speed: ModuleType, devices: dict[str, Any]) -> None:
    for runs in devices.values():
        for run in runs.values():
            shape = Shape(**run["shape"])
            for made in [*run["arms"].values(), *(entry for entry in run["levers"] if not entry.get("ours"))]:
                assert made["figures"] == speed.figures(made, shape, run["rate"]["flops"])
            others = [made for arm, made in run["arms"].items() if arm != "c" and made["figures"]]
            others += [entry for entry in run["levers"] if not entry.get("ours") and entry["figures"]]
            pairs = [statistics.mean(pair) for pair in itertools.pairwise(run["ours"])]
            assert [made["against"] for made in others] == pytest.approx(pairs, abs=0.02), "each beside ours before and after it"
            assert run["ratios"] == speed.ratios(run["arms"])
            assert run["flops_per_token"] == speed.flops_per_token(shape)
            assert set(run["machine"]) == {"device", "cpus", "threads", "memory_gib", "system", "python", "cuda", "packages"}, "no names"


def test_the_readme_says_what_the_json_says(speed: ModuleType, devices: dict[str, Any], tmp_path: Path) -> None:
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert speed.between(readme) == speed.tables(devices)
    copied = tmp_path / "README.md"
    copied.write_text(readme.replace("Goals of the issue", "Hopes"), encoding="utf-8")
    speed.write_readme(devices, copied)
    assert copied.read_text(encoding="utf-8") == readme


def test_goals_are_judged_by_their_figures(speed: ModuleType) -> None:
    assert speed.goals({}).count("not measured yet") == 7

    def run(ratio: float, mfu: float, cap: float = 0) -> dict[str, Any]:
        arms = {"b": {"peak_gb": 20.0, "figures": {}}, "c": {"peak_gb": 10.0, "figures": {"mfu_4n": mfu}}}
        ratios = {f"tokens_per_s c/{arm}": ratio for arm in "abd"} | {"seconds_per_row b/c": ratio}
        return {"cap_gb": cap, "arms": arms, "ratios": ratios}

    good = {"cpu": {"tiny": run(20, 0.5)}, "nvidia_h200": {"llama-8b": run(3, 0.5), "llama-8b, 15 GB": run(1, 0.2, 15)}}
    assert speed.goals(good).count(": reached") + speed.goals(good).count(", reached") == 7
    bad = {"cpu": {"tiny": run(14, 0.5)}, "nvidia_h200": {"llama-8b": run(0.9, 0.4)}}
    assert speed.goals(bad).count("**not reached**") == 5
    assert speed.goals(bad).count("not measured yet") == 1


def test_a_lever_that_beats_ours_and_is_not_in_the_plan_is_left_open(speed: ModuleType, devices: dict[str, Any]) -> None:
    run = devices["cpu"]["tiny"]
    lines = speed.lever_table(devices)[2:]
    assert len(lines) == len(speed.LEVERS)
    for entry, line in zip(run["levers"], lines, strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert len(cells) == 8
        assert cells[4] == "not measured yet" or len(devices) > 1
        if not entry.get("ours") and entry["figures"]:
            faster = float(cells[1]) > speed.FASTER
            assert cells[3] == ("open: faster than ours" if faster else "drop")
        else:
            assert cells[3] == ("keep" if entry.get("ours") else "drop")


def test_runs_of_other_profiles_stay_in_the_file(speed: ModuleType, tmp_path: Path) -> None:
    one = {"machine": {"device": "NVIDIA H200"}, "cap_gb": 0, "x": 1}
    speed.save(one, "tiny", tmp_path)
    file = speed.save(one | {"cap_gb": 15.0}, "llama-8b", tmp_path)
    assert file.name == "train_speed_nvidia_h200.json"
    assert set(json.loads(file.read_text())) == {"tiny", "llama-8b, 15 GB"}


def test_the_command_line_refuses_what_it_cannot_measure(
    speed: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in ((["--arms", "a,z"], "unknown arm z"), (["--arms", "a", "--levers"], "expected c among --arms")):
        monkeypatch.setattr(sys, "argv", ["train_speed.py", *arguments, "--out", "nowhere"])
        assert speed.main() == 1
        assert said in capsys.readouterr().err
    assert isinstance(speed.plan_for("tiny", hardware=CPU), Plan)
