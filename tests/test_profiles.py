"""The dial: profiles, made-up hardware, the plan; and the order of the modules."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

import httpx
import huggingface_hub
import pytest
from conftest import Markup
from hypothesis import assume, given
from hypothesis import strategies as st

from medquad_utils import CourseError, adapters, files, machine
from medquad_utils.machine import Hardware
from medquad_utils.memory import training_memory
from medquad_utils.profiles import PROFILES, ROOM, Shape, choose, resolve

T4 = Hardware("cuda", "Tesla T4", 15.0, (7, 5), cores=2, gpus=1)
V100 = Hardware("cuda", "Tesla V100", 34.0, (7, 0), cores=8, gpus=1)
GTX = Hardware("cuda", "GTX 1050", 2.1, (6, 1), cores=4, gpus=1)
RTX = Hardware("cuda", "RTX 3060", 12.6, (8, 6), cores=12, gpus=1)
L4 = Hardware("cuda", "L4", 23.0, (8, 9), cores=8, gpus=1)
H100 = Hardware("cuda", "H100", 85.0, (9, 0), cores=26, gpus=1)
LAPTOP = Hardware("cpu", "a CPU", 8.0, cores=4)

memory, cores = st.floats(0.3, 200, allow_nan=False), st.integers(1, 128)
capability = st.tuples(st.integers(5, 12), st.integers(0, 9))
cpus = st.builds(
    Hardware, st.just("cpu"), st.just("a CPU"), memory, st.none(), st.booleans(), cores
)
cards = st.builds(
    Hardware, st.just("cuda"), st.just("a GPU"), memory, capability, st.just(False), cores
)
machines = st.one_of(st.sampled_from((T4, V100, GTX, RTX, L4, H100)), cards, cpus)
names = st.sampled_from(list(PROFILES))


@given(names, machines)
def test_a_plan_has_bfloat16_only_where_units_are(profile: str, hardware: Hardware) -> None:
    try:
        plan = resolve(profile, hardware=hardware)
    except CourseError:
        assume(False)
    native = hardware.capability >= (8, 0) if hardware.capability else hardware.bf16_cpu
    other = "float16" if hardware.device == "cuda" else "float32"
    assert plan.compute_dtype == ("bfloat16" if native else other)
    assert plan.adapter_dtype == "float32", "fp16 breaks the scaler, bf16 the resume"
    if hardware in (T4, H100):
        assert plan.fit.max_length == PROFILES[profile].max_length, "no row is lost to a small card"


@given(names, machines)
def test_a_plan_fits_or_names_smaller_profiles(profile: str, hardware: Hardware) -> None:
    chosen = PROFILES[profile]
    try:
        plan = resolve(profile, hardware=hardware)
        _ = plan.fit
    except CourseError as error:
        smaller = list(PROFILES)[: list(PROFILES).index(profile)]
        assert all(name in str(error) for name in smaller)
        assert f"{hardware.memory_gb:.1f} GB" in str(error)
        assert smaller or hardware.memory_gb < 1, "tiny fits wherever Python and torch do"
        return
    assert plan.fit.memory_gb <= hardware.memory_gb == plan.card_gb
    assert plan.fit.memory_gb > 0.5 * chosen.shape.block_parameters / 1e9, "the 4-bit codes alone"
    assert 0 < plan.fit.max_length <= min(chosen.max_length, plan.fit.pack_length)
    assert plan.fit.accumulation * plan.fit.pack_length == chosen.tokens_per_step
    least = sum(training_memory(chosen.shape, plan.micro(plan.fit.max_length)).values())
    tight = least > 0.92 * hardware.memory_gb
    assert plan.fit.checkpointing <= tight, "checkpointing costs time: only where nothing else fits"


def test_shapes_add_up_to_the_published_parameter_counts() -> None:
    published = {"llama-8b": 8_030_261_248, "llama-1b": 1_235_814_400, "small": 134_515_008}
    assert {name: PROFILES[name].shape.parameters for name in published} == published


def test_every_base_of_the_hub_is_pinned_to_a_commit() -> None:
    pins = [profile.revision or "" for profile in PROFILES.values() if profile.name != "tiny"]
    assert all(re.fullmatch("[0-9a-f]{40}", pin) for pin in pins), pins


def test_a_model_path_is_planned_by_the_shape_in_its_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=96, num_hidden_layers=3, intermediate_size=160, num_attention_heads=6,
        vocab_size=500, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert Shape.of(config) == Shape(96, 3, 160, 6, 2, 500, tied=True, head_dim=16)
    small = Hardware("cpu", "a CPU", 2.0)
    with pytest.raises(CourseError):
        _ = resolve("llama-8b", hardware=small).fit
    assert "offers 2.0 GB" in str(resolve("llama-8b", hardware=small)), "it may still ask"
    plan = resolve("llama-8b", hardware=small, model=str(tmp_path / "config.json"))
    assert plan == resolve("llama-8b", hardware=small, model=str(tmp_path))
    assert plan.model_source == str(tmp_path)
    assert plan.fit.memory_gb < 2.0
    adapter = tmp_path / "runs" / "adapter"
    adapter.mkdir(parents=True)
    files.write_json(adapter / "plan.json", plan.as_dict() | {"model_path": "../.."})
    trained = adapters.resolve_trained("tiny", adapter=adapter)
    assert (trained.model_source, trained.model_id) == (str(tmp_path), plan.model_id)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CourseError, match=r"trained on the model in \.\./\.\., which holds no"):
        adapters.resolve_trained("tiny", adapter=adapter)


def test_auto_is_the_profile_of_the_newest_adapter_with_its_seed(tmp_path: Path) -> None:
    for age, name in enumerate(("tiny", "llama-1b", "small")):
        plan = resolve(name, hardware=T4, out=str(tmp_path), seed=age)
        files.write_json(record := plan.folder / "adapter" / "plan.json", plan.as_dict())
        os.utime(record, (1000 - age, 1000 - age))
    newest = adapters.resolve_trained(out=str(tmp_path))
    assert (newest.profile, newest.seed) == ("tiny", 0)
    named = adapters.resolve_trained("small", out=str(tmp_path))
    assert (named.profile, named.seed) == ("small", 2)
    elsewhere = adapters.resolve_trained(adapter=tmp_path / "llama-1b" / "adapter")
    assert (elsewhere.profile, elsewhere.seed) == ("llama-1b", 1)


def test_a_hub_model_is_taken_by_the_plan_and_by_its_adapters_users(
    tmp_path: Path,
) -> None:
    llama, other = PROFILES["llama-8b"], "some-one/Llama_0.1"
    plan = resolve("small", hardware=T4, model=llama.model_id)
    assert (plan.revision, plan.shape, plan.on_hub) == (llama.revision, llama.shape, True)
    plan = resolve("tiny", hardware=T4, model=other, out=str(tmp_path))
    assert (plan.model_source, plan.hub_revision, plan.on_hub) == (other, None, True)
    assert adapters.resolve_trained("tiny", out=str(tmp_path)).model_id == "embedded"
    files.write_json(plan.folder / "adapter" / "plan.json", plan.as_dict() | {"revision": "abc"})
    trained = adapters.resolve_trained("tiny", out=str(tmp_path))
    assert (trained.model_source, trained.hub_revision) == (other, "abc")
    assert adapters.resolve_trained("tiny", out=str(tmp_path), model="a/b").model_id == "a/b"


def test_an_argument_replaces_the_profiles_value_and_zero_keeps_it() -> None:
    fields = ("source", "rows", "max_steps", "lora_r", "lora_alpha", "seed")
    plain = resolve("small", hardware=LAPTOP, out="o")
    assert [getattr(plain, field) for field in fields] == ["hub", 2000, 0, 16, 32, 0]
    options = {"rows": 7, "max_steps": 3, "lora_r": 4, "seed": 5}
    changed = resolve("small", hardware=LAPTOP, out="o", source="sample", **options)  # type: ignore[arg-type]
    assert [getattr(changed, field) for field in fields] == ["sample", 7, 3, 4, 8, 5]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.rows = 8  # type: ignore[misc]


def test_the_plan_prints_what_a_reader_asks_and_escapes_it_as_html() -> None:
    text = str(resolve("llama-8b", hardware=T4))
    for wanted in ("llama-8b", "Meta-Llama-3-8B-Instruct @ 5f0b02c7", "hub", "Tesla T4", "packed",
                   "float16 compute", "rank 16", "GB of 15 GB"):  # fmt: skip
        assert wanted in text
    card = dataclasses.replace(T4, name="<b>A & B")
    plan = resolve("tiny", hardware=card, source="csv", data_path="/data/<script>&amp;.csv")
    page = Markup(plan._repr_html_())
    assert page.tags == {"table", "tr", "th", "td"}
    assert page.text == "".join(text for row in plan.table().items() for text in row)


@given(names, st.lists(st.text("aé <&-_", min_size=1, max_size=12), min_size=1, max_size=4))
def test_a_saved_plan_holds_no_path_of_this_machine(profile: str, parts: list[str]) -> None:
    folder = str(Path("/home/somebody", *parts))
    plan = resolve(profile, hardware=H100, source="csv", data_path=folder + "/rows.csv", out=folder)
    saved = json.loads(json.dumps(plan.as_dict()))
    assert saved["data_path"] == "rows.csv"
    assert "somebody" not in str(saved) + str(plan)
    fields = {field.name for field in dataclasses.fields(plan)} - {"fixed_fit"}
    sizes = {field.name for field in dataclasses.fields(plan.fit)}
    assert (set(saved), set(plan.as_dict(fit=True))) == (fields, fields | sizes)


def test_results_go_where_the_environment_or_the_checkout_says(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDQUAD_OUT", raising=False)
    monkeypatch.chdir(repo / "medquad_utils")
    assert resolve("tiny", hardware=LAPTOP).folder == repo / "runs" / "tiny"
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny", hardware=LAPTOP).folder == tmp_path / "runs" / "tiny"
    monkeypatch.setenv("MEDQUAD_OUT", str(tmp_path / "elsewhere"))
    assert resolve("tiny", hardware=LAPTOP).folder == tmp_path / "elsewhere" / "tiny"
    assert resolve("tiny", hardware=LAPTOP, out="given").folder == Path("given/tiny")


@pytest.mark.parametrize(
    ("hardware", "reachable", "token", "here", "expected", "next_step"),
    [
        (LAPTOP, True, True, "", "tiny", "Runtime > Change runtime type"),
        (LAPTOP, False, False, "small", "tiny", "'small' trains here in about an hour"),
        (T4, False, True, "", "tiny", "Hub is out of reach"),
        (T4, False, False, "small", "small", "Hub is out of reach"),
        (T4, False, False, "small llama-8b", "llama-8b", "a GPU with 15 GB"),
        (T4, True, False, "", "small", "HF_TOKEN"),
        (T4, True, False, "llama-8b", "llama-8b", "a GPU with 15 GB"),
        (T4, True, True, "", "llama-8b", "a GPU with 15 GB"),
        (RTX, True, True, "", "llama-1b", "'llama-8b' needs more: 14 GB"),
        (GTX, True, True, "", "small", "'llama-8b' needs more: 14 GB"),
    ],
)
def test_auto_says_why_and_what_leads_to_a_larger_profile(
    hardware: Hardware, reachable: bool, token: bool, here: str, expected: str, next_step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on_disk = ["embedded", *(PROFILES[name].model_id for name in here.split())]
    waits = Mock(return_value=reachable)
    monkeypatch.setattr(machine, "hub_reachable", waits)
    monkeypatch.setattr(machine, "hub_token", lambda: "hf_x" if token else None)
    monkeypatch.setattr(machine, "is_here", lambda model_id, revision: model_id in on_disk)
    name, why = choose(hardware)
    assert name == resolve(name, hardware=hardware).profile == expected
    assert next_step in why
    assert waits.called == (hardware.device == "cuda"), "on a CPU nobody waits for the Hub"


def test_a_small_card_gets_shorter_examples_before_it_is_refused() -> None:
    sizes, gb = set(), 15.0
    with pytest.raises(CourseError, match=r"even for its shortest rows, but .* offers \d\.\d GB"):
        while True:
            plan = resolve("llama-8b", hardware=dataclasses.replace(T4, memory_gb=gb))
            sizes.add(plan.fit.max_length)
            assert plan.fit.memory_gb <= ROOM * gb
            gb -= 0.1
    longest = PROFILES["llama-8b"].max_length
    assert sizes == {longest, longest // 2, longest // 4}


def test_a_rank_above_the_width_of_every_base_is_refused_at_once() -> None:
    with pytest.raises(CourseError, match="lora_r=4097: expected a rank of at most 4,096"):
        resolve("tiny", hardware=LAPTOP, lora_r=4097)
    assert resolve("tiny", hardware=LAPTOP, lora_r=4096).lora_r == 4096


def test_fetched_weights_and_data_are_used_without_being_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve("small", hardware=LAPTOP).source == "hub"
    monkeypatch.setenv("MEDQUAD_CACHE", str(tmp_path))
    small, medquad = machine.cache(PROFILES["small"].model_id), machine.cache("MedQuAD")
    small.mkdir()
    files.write_json(small / "origin.json", {"note": "4 bits once."})
    medquad.mkdir()
    plan = resolve("small", hardware=LAPTOP)
    assert (plan.model_source, plan.model_path, plan.on_hub) == (str(small), "", False)
    assert (plan.source, plan.data_path, plan.origin) == ("xml", str(medquad), "4 bits once.")
    assert "4 bits once." in str(plan) and str(tmp_path) not in str(plan)
    assert plan.shape == PROFILES["small"].shape
    assert resolve("tiny", hardware=LAPTOP).source == "sample"
    named = resolve("small", hardware=LAPTOP, source="csv", data_path="mine.csv", model="a/b")
    assert (named.data_path, named.model_source, named.origin) == ("mine.csv", "a/b", "")


@pytest.mark.parametrize(
    ("path", "source"),
    [("a.csv", "csv"), ("A.TSV.gz", "csv"), ("a.json", "jsonl"), ("a.parquet", "parquet")],
)
def test_the_ending_of_a_file_names_its_source(path: str, source: str) -> None:
    for profile in ("tiny", "small"):
        assert resolve(profile, hardware=LAPTOP, data_path=path).source == source
    assert resolve("small", hardware=LAPTOP, source="xml", data_path=path).source == "xml"
    with pytest.raises(CourseError, match=r"'folder'. Name its kind, too: csv, .*\(--source"):
        resolve("tiny", hardware=LAPTOP, data_path="folder")


def test_the_hub_is_reachable_only_when_it_answers_well(monkeypatch: pytest.MonkeyPatch) -> None:
    status = [200]
    monkeypatch.setenv("NO_PROXY", "*")

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status[0], request=request)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for address in ("http://127.0.0.1:9", "http://[", "not an address", ""):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert not machine.hub_reachable(timeout=1.0)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    client = httpx.Client(transport=httpx.MockTransport(answer))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: client)
    assert machine.hub_reachable()
    for number in (401, 403, 404, 405, 407, 503):  # a mirror may refuse its home page
        status[0] = number
        assert machine.hub_reachable() == (number not in (407, 503))
    status[0] = 200
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not machine.hub_reachable(), "HF_HUB_OFFLINE=1 means no, whoever answers"
    assert resolve("auto").profile == "tiny", "on this machine"


def test_a_cpu_computes_in_bf16_only_if_that_was_clearly_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seconds, expected in ((0.5, True), (0.9, False), (3.0, False)):
        times = [[9.0, 1.0], [9.0, seconds]]  # of products in fp32, in bf16; the first warms up
        monkeypatch.setattr(machine.timeit, "repeat", Mock(side_effect=times))
        assert machine.fast_bf16.__wrapped__() is expected


# A module imports only those before it. A new module takes its place here.
ORDER = """
medquad_utils atomic files memory machine profiles attention assets assets.sample chat cleaning
splits specialties tables data fetch reference retrieval scores safety estimate quantization lora
plots checks adapters generation preflight training specialise
evaluation report merging explanation publishing serving demo course doctor
cli __main__"""


def place(module: str) -> str:
    """Where a module stands in ``ORDER``; the parts of checks share a place."""
    return "checks" if module.startswith("checks.") else module


def test_a_module_imports_only_those_before_it(repo: Path) -> None:
    """Imports count anywhere: at the top, in a function, or for the type checker only."""
    home, order, seen = repo / "medquad_utils", ORDER.split(), set[str]()
    for file in home.rglob("*.py"):
        parts = file.relative_to(home).with_suffix("").parts
        module = place(".".join(parts).removesuffix(".__init__").replace("__init__", home.name))
        names = set[str]()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: imports are absolute"
                names |= {f"{node.module}.{a.name}" for a in node.names} | {str(node.module)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        ours = {place(name.removeprefix("medquad_utils.")) for name in names} & set(order)
        late = ours - {module, *order[: order.index(module)], "medquad_utils"}
        assert late == set(), f"{module} imports {late}"
        seen.add(module)
    assert seen == set(order)
