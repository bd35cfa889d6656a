"""The dial: profiles, made-up hardware, the plan; and the order of the modules."""

from __future__ import annotations

import ast
import dataclasses
import html.parser
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from medquad_utils import profiles
from medquad_utils.memory import training_memory
from medquad_utils.profiles import PROFILES, SOURCES, CourseError, Hardware, Shape, choose, compute_dtype, micro_batch, resolve

GPUS = (
    Hardware("cuda", "Tesla T4", 15.0, (7, 5), cores=2, gpus=1),
    Hardware("cuda", "Tesla V100", 34.0, (7, 0), cores=8, gpus=1),
    Hardware("cuda", "GTX 1050", 2.1, (6, 1), cores=4, gpus=1),
    Hardware("cuda", "A100", 42.0, (8, 0), cores=12, gpus=1),
    Hardware("cuda", "RTX 3060", 12.6, (8, 6), cores=12, gpus=1),
    Hardware("cuda", "L4", 23.0, (8, 9), cores=8, gpus=1),
    Hardware("cuda", "H100", 85.0, (9, 0), cores=26, gpus=1),
)
memory = st.floats(0.3, 200, allow_nan=False)
cpus = st.builds(Hardware, st.just("cpu"), st.just("a CPU"), memory, st.none(), st.booleans(), st.integers(1, 128))
macs = st.builds(Hardware, st.just("mps"), st.just("Apple GPU"), memory, st.none(), st.booleans(), st.integers(4, 32))
cards = st.builds(
    Hardware, st.just("cuda"), st.just("a GPU"), memory, st.tuples(st.integers(5, 12), st.integers(0, 9)), st.just(False),
    st.integers(1, 128), st.integers(1, 8),
)  # fmt: skip
machines = st.one_of(st.sampled_from(GPUS), cards, cpus, macs)
names = st.sampled_from(list(PROFILES))


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_a_t4_computes_in_float16_with_float32_adapters(profile: str) -> None:
    plan = resolve(profile, hardware=GPUS[0])
    assert (plan.device, plan.compute_dtype, plan.adapter_dtype) == ("cuda", "float16", "float32")
    assert "bfloat16" not in json.dumps(plan.as_dict())


@given(names, machines)
def test_bfloat16_only_where_the_machine_has_it(profile: str, hardware: Hardware) -> None:
    native = hardware.capability >= (8, 0) if hardware.capability else hardware.device == "cpu" and hardware.bf16_cpu
    expected = "bfloat16" if native else "float16" if hardware.device == "cuda" else "float32"
    assert compute_dtype(hardware) == expected
    try:
        plan = resolve(profile, hardware=hardware)
    except CourseError:
        return
    assert plan.compute_dtype == expected
    assert plan.adapter_dtype == ("bfloat16" if native else "float32"), "float16 adapters break the gradient scaler"
    assert plan.device == ("cuda" if hardware.device == "cuda" else "cpu"), "bitsandbytes has no MPS kernels"


# ---- memory ---------------------------------------------------------------------------------------------------------


@given(names, machines)
def test_a_plan_fits_its_machine_or_names_a_smaller_profile(profile: str, hardware: Hardware) -> None:
    try:
        plan = resolve(profile, hardware=hardware)
    except CourseError as error:
        smaller = list(PROFILES)[: list(PROFILES).index(profile)]
        assert all(name in str(error) for name in smaller)
        assert f"{hardware.memory_gb:.1f} GB" in str(error)
        assert smaller or hardware.memory_gb < 1, "tiny fits wherever Python and torch do"
        return
    assert plan.memory_gb <= hardware.memory_gb == plan.card_gb
    weights = 0.5 * PROFILES[profile].shape.block_parameters / 1e9  # no plan can be smaller than its 4-bit codes
    assert plan.memory_gb > weights
    chosen = PROFILES[profile]
    assert 0 < plan.max_length <= chosen.max_length
    assert plan.accumulation >= 1
    assert plan.accumulation & (plan.accumulation - 1) == 0
    plain = training_memory(PROFILES[profile].shape, micro_batch(profile, hardware, plan.lora_r, 1, plan.max_length, 0))
    assert plan.checkpointing <= (sum(plain.values()) > 0.92 * hardware.memory_gb), "checkpointing costs time: only where nothing else fits"


@given(names, cards, st.floats(1, 50))
def test_a_larger_card_never_gets_a_smaller_plan(profile: str, hardware: Hardware, more: float) -> None:
    try:
        small = resolve(profile, hardware=hardware)
    except CourseError:
        assume(False)
    large = resolve(profile, hardware=dataclasses.replace(hardware, memory_gb=hardware.memory_gb + more))
    for plan in (large, small):
        assert plan.batch_size == 1
        assert plan.max_length <= plan.pack_length <= max(plan.max_length, profiles.MAX_PACK[plan.device])
    # first rows that are not too long, then no second forward pass, then as much as possible for each dequantisation
    order = [(plan.max_length, not plan.checkpointing, plan.pack_length) for plan in (large, small)]
    assert order[0] >= order[1]
    tokens = [plan.accumulation * plan.pack_length for plan in (large, small)]
    assert tokens[0] == tokens[1], "the step is the same, however it is cut"


@pytest.mark.parametrize(("profile", "parameters"), [("llama-8b", 8_030_261_248), ("llama-1b", 1_235_814_400), ("small", 134_515_008)])
def test_shapes_add_up_to_the_published_parameter_counts(profile: str, parameters: int) -> None:
    assert PROFILES[profile].shape.parameters == parameters


def test_eight_billion_in_four_bits_fit_a_t4_and_an_l4() -> None:
    for card in (GPUS[0], GPUS[5]):
        assert resolve("llama-8b", hardware=card).max_length == PROFILES["llama-8b"].max_length


def test_a_model_path_is_planned_by_the_shape_in_its_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    shape = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 160, "num_attention_heads": 6, "vocab_size": 500}
    config = LlamaConfig(**shape, num_key_value_heads=2, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    assert Shape.of(config) == Shape(96, 3, 160, 6, 2, 500, tied=True, head_dim=16)
    small = Hardware("cpu", "a CPU", 2.0)
    with pytest.raises(CourseError):
        resolve("llama-8b", hardware=small)
    plan = resolve("llama-8b", hardware=small, model_path=str(tmp_path))
    assert plan.model_source == str(tmp_path)
    assert plan.memory_gb < 2.0
    with pytest.raises(CourseError, match=r"holds no config\.json"):
        resolve("llama-8b", hardware=small, model_path=str(tmp_path / "nothing"))


# ---- arguments ------------------------------------------------------------------------------------------------------

LAPTOP = Hardware("cpu", "a CPU", 8.0, cores=4)


@given(st.text(max_size=30).filter(lambda name: name not in PROFILES and name != "auto"))
def test_an_unknown_profile_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(CourseError, match="expected auto, tiny, small, llama-1b, llama-8b") as caught:
        resolve(name, hardware=LAPTOP)
    assert repr(name) in str(caught.value)


@given(st.text(min_size=1, max_size=30).filter(lambda name: name not in SOURCES))
def test_an_unknown_source_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(CourseError) as caught:
        resolve("tiny", hardware=LAPTOP, source=name)
    assert all(known in str(caught.value) for known in (repr(name), *SOURCES))


@pytest.mark.parametrize("source", ["xml", "csv", "jsonl", "parquet"])
def test_a_file_source_needs_its_path(source: str) -> None:
    with pytest.raises(CourseError, match="needs data_path"):
        resolve("tiny", hardware=LAPTOP, source=source)
    assert resolve("tiny", hardware=LAPTOP, source=source, data_path="here").source == source


def test_zero_and_empty_arguments_keep_the_profile_and_others_replace_it() -> None:
    plain = resolve("small", hardware=LAPTOP, out="o")
    assert (plain.source, plain.rows, plain.max_steps, plain.lora_r, plain.lora_alpha) == ("hub", 2000, 0, 16, 32)
    changed = resolve("small", hardware=LAPTOP, out="o", source="sample", rows=7, max_steps=3, lora_r=4, seed=5)
    assert (changed.source, changed.rows, changed.max_steps, changed.lora_r, changed.lora_alpha, changed.seed) == ("sample", 7, 3, 4, 8, 5)


@pytest.mark.parametrize("thing", [LAPTOP, PROFILES["tiny"], PROFILES["tiny"].shape, resolve("tiny", hardware=LAPTOP)])
def test_hardware_profile_shape_and_plan_are_frozen(thing: object) -> None:
    for field in dataclasses.fields(thing):  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field.name, None)


# ---- how a plan shows itself ----------------------------------------------------------------------------------------


class _Cells(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


@given(st.text(st.sampled_from("<>&\"'ab/ =é"), min_size=1, max_size=20).filter(lambda name: Path(name).name not in ("", "..")))
def test_the_html_table_escapes_what_it_shows(name: str) -> None:
    plan = resolve("tiny", hardware=dataclasses.replace(LAPTOP, device="cuda", name=f"<b>{name}"), source="csv", data_path=f"/data/{name}")
    reader = _Cells()
    reader.feed(plan._repr_html_())
    assert reader.tags == {"table", "tr", "th", "td"}
    assert reader.cells == [text for row in plan.table() for text in row]


def test_the_printed_plan_says_all_that_a_reader_asks() -> None:
    text = str(resolve("llama-8b", hardware=GPUS[0]))
    wanted = ("llama-8b", "Meta-Llama-3-8B-Instruct @ 5f0b02c7", "hub", "Tesla T4", "float16 compute", "rank 16", "packed", "GB of 15 GB")
    assert [w for w in wanted if w not in text] == []
    assert len(text.splitlines()) == len(resolve("llama-8b", hardware=GPUS[0]).table())


@given(names, st.sampled_from(GPUS[3:]), st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=4))
def test_a_saved_plan_holds_no_path_of_this_machine(profile: str, hardware: Hardware, parts: list[str]) -> None:
    assume(not any(c in part for c in "/\0" for part in parts))
    folder = str(Path("/home/somebody", *parts))
    plan = resolve(profile, hardware=hardware, source="csv", data_path=folder + "/rows.csv", out=folder)
    saved = json.loads(json.dumps(plan.as_dict()))
    assert saved["data_path"] == "rows.csv"
    assert [value for value in saved.values() if isinstance(value, str) and ("somebody" in value or value.startswith(("/", "~")))] == []
    assert "/home/somebody" not in str(plan)
    assert set(saved) == {field.name for field in dataclasses.fields(plan)}


def test_results_go_where_the_environment_or_the_checkout_says(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDQUAD_OUT", raising=False)
    monkeypatch.chdir(repo / "medquad_utils")
    assert resolve("tiny", hardware=LAPTOP).folder == repo / "runs" / "tiny"
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny", hardware=LAPTOP).folder == tmp_path / "runs" / "tiny"
    monkeypatch.setenv("MEDQUAD_OUT", str(tmp_path / "elsewhere"))
    assert resolve("tiny", hardware=LAPTOP).folder == tmp_path / "elsewhere" / "tiny"
    assert resolve("tiny", hardware=LAPTOP, out="given").folder == Path("given/tiny")


# ---- auto -----------------------------------------------------------------------------------------------------------


@given(machines, st.booleans(), st.booleans())
def test_auto_takes_a_profile_that_fits_and_that_can_be_had(hardware: Hardware, reachable: bool, token: bool) -> None:
    name, why = choose(hardware, reachable, token)
    profile = PROFILES[name]
    assert reachable or profile.source == "sample"
    assert not profile.gated or (token and hardware.device == "cuda")
    assert why.startswith("auto: ")
    if hardware.memory_gb >= 1:
        assert resolve(name, hardware=hardware).profile == name


@pytest.mark.parametrize(
    ("hardware", "reachable", "token", "expected", "next_step"),
    [
        (LAPTOP, False, False, "tiny", "network"),
        (GPUS[0], False, True, "tiny", "network"),
        (LAPTOP, True, False, "small", "Runtime > Change runtime type"),
        (LAPTOP, True, True, "small", "Runtime > Change runtime type"),
        (Hardware("mps", "Apple GPU", 16.0), True, True, "small", "no CUDA GPU"),
        (Hardware("cpu", "a CPU", 1.0), True, True, "tiny", "2 GB"),
        (GPUS[0], True, False, "small", "HF_TOKEN"),
        (GPUS[0], True, True, "llama-8b", "room for 8 B"),
        (GPUS[6], True, True, "llama-8b", "room for 8 B"),
        (GPUS[4], True, True, "llama-1b", "'llama-8b' needs 14 GB"),
        (GPUS[2], True, True, "small", "'llama-1b' needs 4 GB"),
    ],
)
def test_auto_says_why_and_what_leads_to_the_next_one(
    hardware: Hardware, reachable: bool, token: bool, expected: str, next_step: str
) -> None:
    name, why = choose(hardware, reachable, token)
    assert name == expected
    assert next_step in why


def test_auto_without_a_network_resolves_to_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = resolve("auto", hardware=GPUS[6])
    assert (plan.profile, plan.source) == ("tiny", "sample")
    assert "out of reach" in str(plan)


def test_detection_describes_this_machine() -> None:
    import torch

    found = profiles.detect()
    assert found.device == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    assert (found.capability is None) == (found.device != "cuda")
    assert found.memory_gb > 0.5
    assert found.cores >= 1


# ---- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[int]]]:
    """A server on this machine in the Hub's place: its address, and a list whose first number is the status it answers with."""
    status = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", address)
    yield address, status
    server.shutdown()
    server.server_close()


def test_the_hub_is_reachable_when_it_answers_well(hub: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert profiles.hub_reachable()
    hub[1][0] = 503
    assert not profiles.hub_reachable()
    hub[1][0] = 200
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not profiles.hub_reachable(), "HF_HUB_OFFLINE=1 means no, whoever answers"


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://[", "not an address", ""])
def test_a_hub_that_cannot_be_reached_is_a_no_and_not_an_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert profiles.hub_reachable(timeout=1.0) is False


def test_the_token_comes_from_the_environment_and_a_blank_one_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert profiles.hub_token() is None
    monkeypatch.setenv("HF_TOKEN", "hf_example\n")
    assert profiles.hub_token() == "hf_example"
    monkeypatch.setenv("HF_TOKEN", " \n")
    assert profiles.hub_token() is None


# ---- imports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["medquad_utils", "medquad_utils.cli", "medquad_utils.profiles", "medquad_utils.data"])
def test_importing_loads_no_heavy_library(module: str, repo: Path) -> None:
    code = f"import sys, {module}; print(*sorted(m.split('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "medquad_utils" in loaded
    assert loaded & {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "pandas", "pyarrow", "matplotlib"} == set()


# Every module of the package may import only those before it: the arrows of the design run one way. A new module takes its place here.
ORDER = (
    "medquad_utils",
    "medquad_utils.memory",
    "medquad_utils.profiles",
    "medquad_utils.launch",
    "medquad_utils.assets",
    "medquad_utils.assets.sample",
    "medquad_utils.chat",
    "medquad_utils.cleaning",
    "medquad_utils.data",
    "medquad_utils.safety",
    "medquad_utils.retrieval",
    "medquad_utils.questions",
    "medquad_utils.scores",
    "medquad_utils.assets.build",
    "medquad_utils.estimate",
    "medquad_utils.quantization",
    "medquad_utils.lora",
    "medquad_utils.plots",
    "medquad_utils.checks",
    "medquad_utils.generation",
    "medquad_utils.merging",
    "medquad_utils.training",
    "medquad_utils.arms",
    "medquad_utils.evaluation",
    "medquad_utils.specialising",
    "medquad_utils.report",
    "medquad_utils.explanation",
    "medquad_utils.model_card",
    "medquad_utils.publishing",
    "medquad_utils.serving",
    "medquad_utils.demo",
    "medquad_utils.course",
    "medquad_utils.readiness",
    "medquad_utils.cli",
)


def _modules(repo: Path) -> dict[str, Path]:
    files = sorted((repo / "medquad_utils").rglob("*.py"))
    return {".".join(f.relative_to(repo).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def _imported(file: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that ``file`` imports anywhere: at the top, in a function, or for the type checker only."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: imports are absolute"
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in modules else str(node.module) for a in node.names}
    return found & set(modules)


def test_the_order_names_every_module(repo: Path) -> None:
    assert sorted(ORDER) == sorted(_modules(repo))


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_those_before_it(module: str, repo: Path) -> None:
    modules = _modules(repo)
    before = set(ORDER[: ORDER.index(module)])
    assert _imported(modules[module], modules) - before == set()
