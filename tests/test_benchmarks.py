"""The benchmarks run, compare like with like, and README.md says what was measured."""

import dataclasses
import json
import math
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import benchmark
from stamp import between

from medquad_utils import estimate, evaluation, generation, machine, profiles

CPU = machine.Hardware("cpu", "CPU", 24, cores=2)
common, train_speed, generate_speed = map(benchmark, ("common", "train_speed", "generate_speed"))
published, seeds = benchmark("published"), benchmark("seeds")
load_memory, look_up, random_llama = map(benchmark, ("load_memory", "look_up", "random_llama"))
compare_adapters = benchmark("compare_adapters")
LENGTHS, MEMORY = (json.loads(p.read_text()) for p in (train_speed.LENGTHS, load_memory.RECORD))
SPEEDS = {name: common.read_results(name) for name in ("train_speed", "generate_speed")}
ASSET = evaluation.measured()["rougeL"]
KNOWN = {"all rows": (0.32, 0.29), "without boilerplate": (0.23, 0.19)}  # counted by others


@pytest.mark.parametrize("script", [*SPEEDS, "load_memory"])
def test_readme_of_the_benchmarks_says_what_the_json_says(script: str) -> None:
    page = between(common.README.read_text(encoding="utf-8"), common.marks(script))
    assert page == benchmark(script).page(SPEEDS.get(script, MEMORY))


def test_the_estimate_is_near_every_published_run() -> None:
    text = common.README.read_text(encoding="utf-8")
    assert between(text, common.marks("published")) == published.page()
    speeds = [run.estimated() / run.tokens_per_s for run in published.RUNS if run.tokens_per_s]
    peaks = [run.bill().memory_gb / run.gb for run in published.RUNS if run.gb]
    assert (len(speeds), len(peaks)) == (8, 2)
    assert all(0.7 < ratio < 1.4 for ratio in speeds + peaks)


def test_random_llama_loads_in_4_bits_with_its_exact_shape(tmp_path: Any) -> None:
    shape = profiles.Shape(64, 2, 128, 4, 2, 3100)
    first, again = (random_llama.write(shape, tmp_path / name) for name in "ab")
    assert len({(f / "model.safetensors").read_bytes() for f in (first, again)}) == 1, "seeded"
    model = generation.load_base(profiles.resolve("tiny", hardware=CPU, model=str(first)))
    assert profiles.Shape.of(model.config).parameters == shape.parameters


def test_every_arm_trains_on_the_rows_of_the_committed_run() -> None:
    plan = train_speed.plan_for("tiny", hardware=CPU)
    drawn = {arm: train_speed.drawn_rows(plan, {}, arm, LENGTHS, 8) for arm in "abc"}
    assert [len(drawn[arm][0]) for arm in "ab"] == [4, 8], "rows of the arm's own warm-up step"
    rows, run = drawn["c"][1], SPEEDS["train_speed"]["cpu"]["tiny"]["arms"]["c"]
    assert all(others == rows for _, others in drawn.values())
    assert sum(len(row["input_ids"]) for row in rows) == run["row_tokens"]
    for ids, labels in ((row["input_ids"], row["labels"]) for row in rows):
        prompt = labels.count(-100)
        assert 0 < prompt < len(ids) <= 512
        assert labels == [-100] * prompt + ids[prompt:]


def test_pads_are_computed_and_not_real_and_figures_follow_by_hand() -> None:
    ids, places = torch.tensor([[5, 6, 7, 8, 9, 0]]), torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert train_speed.count({"input_ids": ids.view(2, 3)}, pad=0) == (5, 6, 2)
    assert train_speed.count({"input_ids": ids, "position_ids": places}, pad=0) == (5, 6, 2)
    shape = profiles.Shape(4, 1, 8, 2, 2, 10)  # 4 x (4 x 16 + 3 x 32 + 40) = 800 FLOP a token
    steps = [{"seconds": s, "real": 60, "computed": 80, "rows": 5} for s in (99.0, 2.0, 2.0)]
    assert train_speed.figures({"steps": steps, "rows": 8, "row_tokens": 80}, shape, 1e5) == {
        "measured_steps": 2, "rows": 10, "pads": 0.25, "tokens_per_s": 30, "rows_per_s": 3,
        "seconds_per_step": 2, "mfu_4n": 30 * 800 / 1e5,
    }  # fmt: skip


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The jobs of ``train_speed.main``, none of which is done and nothing written."""
    jobs: list[dict[str, Any]] = []
    step = {"seconds": 1.0, "real": 60, "computed": 80, "rows": 5}
    made = {"steps": [step] * 3, "rows": 8, "row_tokens": 80, "peak_gb": 1.0}

    def work(job: dict[str, Any]) -> dict[str, Any]:
        jobs.append(job)
        return {"flops": 1e9, "dtype": "float32"} if job["arm"] == "rate" else dict(made)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_speed, "apart", work)
    for name in ("save", "write_readme"):
        monkeypatch.setattr(common, name, lambda *_: None)
    return jobs


def test_a_budget_leaves_arms_and_levers_out(pretended: list[dict[str, Any]]) -> None:
    run = train_speed.main(["--levers", "--budget", "0"])
    assert {lever.get("error", "ours") for lever in run["levers"]} == {"no time was left", "ours"}
    assert [run["arms"][arm] for arm in "ab"] == [{"error": "no time was left"}] * 2
    assert [job["arm"] for job in pretended] == ["rate", "c"]
    assert "no time was left" in train_speed.page({"cpu": {"tiny": run}})


@pytest.mark.parametrize(("cuda", "work"), [(True, "here"), (False, "apart")])
def test_arms_share_one_process_on_a_gpu_only(
    cuda: bool, work: str, pretended: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(train_speed, "measure", lambda options, work: given.append(work))
    train_speed.main([])
    assert given == [getattr(train_speed, work)]


def test_no_arm_takes_five_minutes_wherever_it_hangs(
    pretended: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_speed.main(["--levers"])
    assert len(pretended) > 10 and max(job["limit"] for job in pretended) < 300
    monkeypatch.setattr(train_speed, "drawn_rows", lambda *_: ([], []))
    monkeypatch.setattr(train_speed, "our_trainer", lambda *_: time.sleep(60))
    began = time.monotonic()
    made = train_speed.here(pretended[1] | {"limit": 0.5})
    assert made == {"error": "stopped after 0 s"} and time.monotonic() - began < 10
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0), "the next arm has its own time"


def test_small_is_measured_on_its_real_weights_and_others_on_random_ones(
    pretended: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDQUAD_CACHE", str(tmp_path))
    real = profiles.Shape(64, 2, 128, 4, 2, 3100)  # told apart from the profile's
    random_llama.write(real, tmp_path / "HuggingFaceTB--SmolLM2-135M-Instruct")
    monkeypatch.setitem(random_llama.SHAPES, "20m", real)
    for profile, drawn in (("small", False), ("20m", True)):
        run = train_speed.main(["--profile", profile, "--arms", "b"])
        assert profiles.Shape(**run["shape"]) == real
        assert bool(pretended[-1]["folder"]) == drawn
    assert train_speed.plan_for("small").model_source.startswith(str(tmp_path))


@pytest.mark.full  # trains three times
def test_training_benchmark_runs_and_estimate_reads_it(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(train_speed, "resolve", partial(train_speed.resolve, hardware=CPU))
    run = train_speed.main(["--smoke"])
    for key in ("row_tokens", "trainable"):
        assert run["arms"]["b"][key] == run["arms"]["c"][key]
    assert {arm["idle_adapters"] for arm in run["arms"].values()} == {0}
    assert run["arms"]["b"]["against"] == pytest.approx(sum(run["ours"]) / 2, abs=0.01)
    common.save("train_speed", "tiny", run, tmp_path)
    assert [r.tokens_per_second for r in estimate.read_runs(tmp_path)] == [min(run["ours"])]


@pytest.mark.full  # trains eleven times
def test_the_script_for_a_gpu_runs_dry(tmp_path: Any, monkeypatch: Any) -> None:
    on_gpu = benchmark("on_gpu")
    for module in (on_gpu, train_speed):
        monkeypatch.setattr(module, "resolve", partial(profiles.resolve, hardware=CPU))
    arguments = ["--profile", "tiny", "--out", str(tmp_path), "--budget"]
    assert all("skipped" in line for line in on_gpu.main([*arguments, "0"]))
    lines = {line["check"]: line for line in on_gpu.main([*arguments, "120"])}
    written = (tmp_path / "on_gpu.jsonl").read_text().splitlines()
    assert [json.loads(line)["check"] for line in written] == list(lines)
    assert [line for line in lines.values() if "error" in line or "skipped" in line] == []
    assert lines["resume"]["largest_difference"] == 0
    assert lines["resume"]["whole"] == lines["resume"]["resumed"] == ["float32"]
    assert lines["attention"]["largest_difference"] < 1e-5
    assert lines["generate"]["equal_twice"] and lines["generate"]["card_equal_of_4"] == 4
    plan, varlen = (lines[name] for name in ("plan", f"attention: {profiles.VARLEN}"))
    assert plan["loss"] == pytest.approx(varlen["loss"], rel=2e-3), "the same rows"
    (run,) = estimate.read_runs(tmp_path)
    assert run.tokens_per_second == plan["figures"]["tokens_per_s"]
    assert "attention: sdpa" in train_speed.page(common.read_results("train_speed", tmp_path))


@pytest.mark.full  # answers fifteen times
def test_every_way_of_answering_gives_the_same_answers(monkeypatch: Any) -> None:
    monkeypatch.setattr(generate_speed, "resolve", partial(generate_speed.resolve, hardware=CPU))
    run = generate_speed.main(["--smoke"])
    assert [entry["same"] for entry in run["equal"] + run["stopping"]] == 15 * [4]
    assert {entry["tokens"] for entry in run["equal"]} == {16}


@pytest.mark.full  # loads in a process of its own
def test_loading_in_4_bits_never_holds_two_copies() -> None:
    found = load_memory.main(["--smoke"])
    most = sum(found["predicted_gb"].values()) + 0.01  # threads and buffers
    assert 0.8 * found["weights_gb"] < found["added_at_peak_gb"] <= most
    assert found["added_afterwards_gb"] <= found["weights_gb"] + 0.01
    assert most < found["weights_gb"] + found["files_gb"] / 2, "half of a second copy would show"


def test_colab_page_says_what_loading_and_training_take() -> None:
    big, page = MEMORY["llama_8b"], common.README.parents[2] / "Colab.md"
    assert big["cpu_peak_gb"] == load_memory.extrapolated(*MEMORY["slices_of_8b"].values()) < 12
    lines = page.read_text(encoding="utf-8").splitlines()
    assert f"{big['cpu_peak_gb']:.1f} GB" in " ".join(lines)
    for start, card in (("| T4,", "T4"), ("| L4,", "L4"), ("| A100,", "A100-40")):
        end = f"| {estimate.estimate('llama-8b', card).memory_gb:.1f} GB | not measured yet |"
        assert any(line.startswith(start) and line.endswith(end) for line in lines), card


def test_look_up_runs_and_the_asset_is_close_to_what_was_known() -> None:
    assert list(look_up.main(["--smoke"])["rougeL"]) == list(KNOWN)
    for kind, cells in ASSET.items():
        assert [cell["mean"] for cell in cells.values()] == pytest.approx(KNOWN[kind], abs=0.02)


@pytest.mark.full  # the real MedQuAD
def test_asset_and_lengths_are_those_of_medquad(medquad_xml: Any, real_rows: Any) -> None:
    for kind, cells in look_up.measure(real_rows)["rougeL"].items():
        assert cells == {name: pytest.approx(ASSET[kind][name], abs=1e-3) for name in cells}
        for name, cell in cells.items():
            assert cell["diseases"] < cell["n"] and cell["low"] < cell["mean"] < cell["high"]
            unstemmed = evaluation.measured()["rougeL_unstemmed"][kind][name]
            assert cell["mean"] - 0.03 < unstemmed["mean"] < cell["mean"]
    # The committed runs drew their rows from lengths without the 16 rows of the second layout.
    now = train_speed.measure_lengths(medquad_xml)
    assert now["rows"] - LENGTHS["rows"] == 16
    for part in ("prompt", "answer"):
        assert now[part] == pytest.approx(LENGTHS[part], rel=0.02)


def result(arm: Any, score: float) -> dict[str, Any]:
    """A made-up result of ``compare_adapters.measure``."""
    tried = {"0.001": score, "0.003": score + 1, "0.01": math.inf}
    made = {"bits_per_byte": [score, score + 0.2], "validation": tried}
    return dataclasses.asdict(arm) | {"name": arm.name} | made


def test_the_figure_of_the_comparison_sorts_all_arms_by_what_they_change() -> None:
    arms = compare_adapters.arms()
    table = compare_adapters.figure([result(arm, n) for n, arm in enumerate(arms)])
    rates = {"rate 0.001": (2, 2, 2), "rate 0.003": (3, 3, 3)}
    assert table["learning rate"] == rates, "LoRA of rank 16 is the third arm"
    assert list(table["rank"]) == ["rank 2", "rank 8", "rank 16", "rank 64"]
    assert table["rank"]["rank 16"] == pytest.approx((2.1, 2, 2.2))
    assert list(table["name"]) == ["LoRA", "rsLoRA", "DoRA", "OLoRA", "MiSS"]
    assert list(table["layers"]) == ["all linear", "q and v", "attention"]
    base = ["QLoRA", "LoRA, base not quantised", "full fine-tuning"]
    assert list(table["base and method"]) == base
    assert table["name"]["LoRA"] == table["layers"]["all linear"] == table["rank"]["rank 16"]
    core = [result(arm, n) for n, arm in enumerate(compare_adapters.arms(core=True))]
    assert list(compare_adapters.figure(core)) == ["learning rate", "rank"]
    assert compare_adapters.figure(core[:1]) == {}, "a run that has just begun"
    spans = {"rate": {"all": (1, 1, 1), "q": (3, 2, 4)}, "rank": {"2": (1, 1, 1), "8": (2, 2, 2)}}
    said = "tiny: the rate matters most"
    assert compare_adapters.finding("tiny", spans) == said


@pytest.mark.full
def test_the_comparison_trains_and_scores_two_arms(tmp_path: Any) -> None:
    lora, miss = compare_adapters.main(["--quick", "--out", str(tmp_path)])
    assert (lora["name"], miss["name"]) == ("LoRA of rank 16", "MiSS of rank 2")
    assert lora["parameters"] == 286_720
    for arm in (lora, miss):
        tried = arm["validation"]
        assert len(tried) == 2 and tried[f"{arm['rate']:g}"] == min(tried.values())
        assert len(arm["bits_per_byte"]) == len(arm["forgetting"]) == 2
        assert all(0 < bits < 8 for bits in arm["bits_per_byte"])


def test_three_seeds_give_three_scores_each_in_its_interval() -> None:
    runs = json.loads(seeds.FILE.read_text())["seeds"]
    assert list(runs) == ["0", "1", "2"]
    for score in seeds.SCORES:
        cells = [run[score] for run in runs.values()]
        assert all(c["low"] < c["mean"] < c["high"] and c["diseases"] > 5 for c in cells)
    assert len({run["rougeL"]["mean"] for run in runs.values()}) == 3, "the seed changes the run"


@pytest.mark.full  # trains two steps, answers 102 questions
def test_the_seeds_script_scores_a_training() -> None:
    found = seeds.main(["--smoke", "--seeds", "1", "--steps", "2"])
    assert 0 <= found["seeds"]["0"]["rougeL"]["mean"] < 0.9, "two steps do not train an adapter"
