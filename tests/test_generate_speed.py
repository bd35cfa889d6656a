"""The generation benchmark compares arms that do the same work, and its page says what was measured. No times are tested."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import BENCHMARKS, benchmark

from medquad_utils import generation
from medquad_utils.generation import Answer
from medquad_utils.profiles import PROFILES, CourseError


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    module: ModuleType = benchmark("generate_speed")
    return module


@pytest.fixture(scope="module")
def devices(speed: ModuleType) -> dict[str, Any]:
    made: dict[str, Any] = speed.read_results(speed.RESULTS)
    return made


@pytest.fixture(scope="module")
def bench(speed: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four questions for the shipped model with a random adapter; the bandwidth is 1 GB/s, which no test looks at a clock for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "bandwidth", lambda: 1e9)
        plan = speed.plan_for("tiny", None)
        adapter = speed.random_adapter(plan, tmp_path_factory.mktemp("made") / "adapter")
        return speed.Bench(plan, adapter, speed.questions(4), rounds=1)


# ---- arms -----------------------------------------------------------------------------------------------------------


def test_every_arm_gives_the_answers_of_one_by_one_and_as_many_tokens(speed: ModuleType, bench: Any) -> None:
    made = bench.run(speed.EQUAL, 4, [-1])
    measured = [entry for entry in made if "error" not in entry]
    assert [(e["arm"], e["weights"]) for e in made] == [(str(arm), arm.weights) for arm in speed.EQUAL]
    assert len(measured) == len(speed.EQUAL) - 2
    for entry in measured:
        assert (entry["same"], entry["tokens"], entry["stopped"]) == (4, 16, 0), entry
    assert {entry.get("error") for entry in made if "compiled" in entry["arm"]} == {"not measured yet"}


def test_answers_that_stop_are_the_same_in_every_arm_and_of_several_lengths(speed: ModuleType, bench: Any) -> None:
    ends = bench.tokenizer.encode(".", add_special_tokens=False)
    made = bench.run(speed.stopping(cuda=False), 24, ends)
    assert [entry["same"] for entry in made] == [4] * 4
    assert 0 < made[0]["stopped"] <= 4
    assert made[0]["tokens"] < 4 * 24
    assert len({(entry["tokens"], entry["stopped"]) for entry in made}) == 1


def test_the_packed_arm_is_packed_and_the_unpacked_one_is_not(speed: ModuleType, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    made: list[int] = []
    real = bitsandbytes.matmul_4bit

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", counted)
    model = generation.load_tuned(bench.plan, bench.adapter)
    for batch in (1, 0):
        speed.answer(speed.Arm(batch, "unpacked"), model, bench.tokenizer, bench.asked[:1], 2, [-1])
        assert made == []
    for batch in (1, 0):
        speed.answer(speed.Arm(batch, "4-bit"), model, bench.tokenizer, bench.asked[:1], 2, [-1])
        assert made
        made.clear()


def test_a_request_that_was_lost_or_failed_stops_the_continuous_arm(speed: ModuleType, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching.requests import GenerationOutput

    model = generation.load_base(bench.plan)
    done = GenerationOutput("0", generated_tokens=[5])
    for given in ([done], [done, GenerationOutput("1", error="no room")]):
        monkeypatch.setattr(type(model), "generate_batch", lambda *_, given=given, **__: dict(enumerate(given)))
        with pytest.raises(RuntimeError, match=f"answered {len(given)} of 2"):
            speed.continuously(model, bench.tokenizer, bench.asked[:2], 2, [-1])


def test_an_arm_that_fails_says_why_and_without_the_first_there_is_no_result(
    speed: ModuleType, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = speed.answer, speed.Arm(8, "4-bit")

    def answer(arm: Any, *rest: Any) -> Any:
        if arm == broken:
            raise ValueError("out of paper")
        return real(arm, *rest)

    monkeypatch.setattr(speed, "answer", answer)
    made = bench.run((speed.Arm(1, "unpacked"), broken), 2, [-1])
    assert made[1] == {"arm": "batches of 8", "weights": "4-bit", "error": "out of paper"}
    assert "| batches of 8 | 4-bit | out of paper |" in speed.table(made, 4)[-1]
    with pytest.raises(CourseError, match="one by one, 4-bit: stuck"):
        monkeypatch.setattr(speed.Arm, "cannot", lambda self, cuda: "stuck")
        bench.run((speed.Arm(1, "4-bit"),), 2, [-1])


def test_which_arms_run_where(speed: ModuleType) -> None:
    off = {cuda: [arm for arm in speed.EQUAL if arm.cannot(cuda)] for cuda in (False, True)}
    assert all(arm.compiled for arm in off[False])
    assert {arm.weights for arm in off[True]} == {"unpacked"}
    assert {arm.weights for arm in speed.EQUAL if arm.compiled} == {"merged"}
    assert not any(arm.cannot(cuda) for cuda in (False, True) for arm in speed.stopping(cuda))


# ---- figures --------------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_step_are_those_of_the_shape(speed: ModuleType, bench: Any) -> None:
    shape = PROFILES["tiny"].shape
    norms = shape.hidden * (2 * shape.layers + 1)
    adapter = shape.layers * sum(bench.plan.lora_r * (i + o) for i, o in shape.linears().values())
    rest = 4 * (shape.embedding_parameters + norms + adapter)  # the embedding is the head, too
    model = generation.load_tuned(bench.plan, bench.adapter)
    assert speed.bytes_per_step(model, "unpacked") == 4 * shape.block_parameters + rest
    packed = shape.block_parameters * (4 + 8 / 64) / 8
    assert packed < speed.bytes_per_step(model, "4-bit") - rest < packed * 1.01, "and a scale of scales for 256 blocks"
    separate = generation.load_base(bench.plan, quantized=False)
    whole = speed.bytes_per_step(separate, "merged")
    assert whole == 4 * (shape.parameters)
    separate.lm_head.weight = type(separate.lm_head.weight)(separate.lm_head.weight.detach().clone())
    assert speed.bytes_per_step(separate, "merged") == whole, "of an embedding that is no head, a row a token is read"


def test_figures_by_hand(speed: ModuleType) -> None:
    first = [Answer("a b", 2, True), Answer("c", 1, False)]
    assert speed.figures(0.5, [first[0], Answer("d", 4, False)], first, 24.0) == {
        "seconds": 0.5, "tokens": 6, "tokens_per_s": 12.0, "stopped": 1, "same": 1, "limit": 24.0, "share": 0.5,
    }  # fmt: skip


def test_the_questions_differ(speed: ModuleType) -> None:
    asked = [messages[-1]["content"] for messages in speed.questions(32)]
    assert len(set(asked)) == 32
    assert len({len(text) for text in asked}) > 5


# ---- what is written ------------------------------------------------------------------------------------------------


def test_the_json_holds_every_arm_and_says_where_it_was_measured(speed: ModuleType, devices: dict[str, Any]) -> None:
    assert set(devices["cpu"]) >= {"tiny", "20m"}
    for device, runs in devices.items():
        for name, run in runs.items():
            assert set(run["machine"]) == {
                "device", "cpus", "threads", "memory_gib", "system", "python", "cuda", "packages",
            }, "no names"  # fmt: skip
            assert [(e["arm"], e["weights"]) for e in run["equal"]] == [(str(arm), arm.weights) for arm in speed.EQUAL]
            arms = speed.stopping(device != "cpu") if name == "tiny" else ()
            assert [(e["arm"], e["weights"]) for e in run["stopping"]] == [(str(arm), arm.weights) for arm in arms]
            assert all(e["tokens"] == run["questions"] * run["new_tokens"] for e in run["equal"] if "error" not in e)


def test_the_figures_of_the_json_agree_with_each_other(devices: dict[str, Any]) -> None:
    rows = {"one by one": 1, "batches of 8": 8}
    for runs in devices.values():
        for run in runs.values():
            for entry in [e for e in run["equal"] + run["stopping"] if "error" not in e]:
                assert entry["tokens_per_s"] == pytest.approx(entry["tokens"] / entry["seconds"], rel=0.01)
                assert entry["share"] == pytest.approx(entry["tokens_per_s"] / entry["limit"], rel=0.01, abs=1e-4)
                limit = run["bandwidth_gb_s"] * 1e9 / entry["bytes"] * rows.get(entry["arm"].split(",")[0], min(32, run["questions"]))
                assert math.isclose(entry["limit"], limit, rel_tol=0.02)


def test_unpacked_weights_gave_the_packed_answers(devices: dict[str, Any]) -> None:
    """What the course relies on: one by one to the bit, in batches as many as the packed batches had."""
    for run in devices["cpu"].values():
        same = {(e["arm"], e["weights"]): e["same"] for e in run["equal"] if "error" not in e}
        assert same["one by one", "unpacked"] == run["questions"]
        for arm in ("batches of 8", "batches of 32"):
            assert same[arm, "unpacked"] == same[arm, "4-bit"]


def test_the_readme_says_what_the_json_says(speed: ModuleType, devices: dict[str, Any], tmp_path: Path) -> None:
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert speed.between(readme) == speed.tables(devices)
    copied = tmp_path / "README.md"
    copied.write_text(readme.replace("a copy moves", "a copy might move"), encoding="utf-8")
    speed.write_readme(devices, copied)
    assert copied.read_text(encoding="utf-8") == readme


def test_a_run_is_saved_beside_the_other_profiles_of_its_device(speed: ModuleType, tmp_path: Path) -> None:
    run = {"machine": {"device": "NVIDIA H200"}}
    for name in ("llama-1b", "llama-8b"):
        file = speed.save(run, name, tmp_path)
    assert file.name == "generate_speed_nvidia_h200.json"
    assert json.loads(file.read_text()) == {"llama-1b": run, "llama-8b": run}


def test_the_verdict_compares_what_the_course_does_with_what_it_does_not(speed: ModuleType) -> None:
    def entry(batch: int, weights: str, rate: float) -> dict[str, Any]:
        return {"arm": str(speed.Arm(batch, weights)), "weights": weights, "tokens_per_s": rate, "same": 3}

    entries = [entry(1, "4-bit", 10), entry(1, "unpacked", 25), entry(32, "unpacked", 90), entry(0, "unpacked", 30)]
    said = speed.verdict({"equal": entries, "stopping": [], "questions": 4})
    assert said == (
        "Unpacked over 4-bit: one by one 2.50 times (3 of 4 same). "
        "Batches of 32 over continuous batching, both unpacked: equal work 3.00 times."
    )
    gpu = [entry(32, "4-bit", 80), entry(0, "4-bit", 160)]
    assert "both 4-bit: equal work 0.50 times" in speed.verdict({"equal": gpu, "stopping": [], "questions": 4})
