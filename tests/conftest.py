"""Shared fixtures. Nothing here reaches the network, and nothing writes into the checkout."""

from __future__ import annotations

import html.parser
import importlib
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from medquad_utils.cleaning import Effect
    from medquad_utils.files import Row
    from medquad_utils.profiles import Plan

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MEDQUAD_CACHE"] = os.devnull  # what a developer has fetched must not change a test
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: waiting threads do not spin

# Alike on every machine, however slow: no deadline, the same examples every time.
hypothesis.settings.register_profile(
    "course",
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    # No shrinking: a failure would spend minutes on a smaller example.
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("course")

REPO = Path(__file__).parent.parent
BENCHMARKS = REPO / "tests" / "benchmarks"


def benchmark(name: str) -> Any:
    """A module of tests/benchmarks; they find each other by their folder."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


GET_CHROMIUM = (
    "needs Chromium: apt-get install chromium (as root), or python -m playwright install chromium"
)
QUIET = """--no-sandbox --disable-dev-shm-usage --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync"""


@contextmanager
def chromium(*more: str) -> Iterator[Browser]:
    """A headless Chromium, the system's or Playwright's; ``more`` are further options of it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        found = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
        if not Path(found).is_file():
            (pytest.fail if os.environ.get("CI") else pytest.skip)(GET_CHROMIUM)
        args = [*QUIET.split(), *more]
        opened = playwright.chromium.launch(executable_path=found, headless=True, args=args)
        yield opened
        opened.close()


class Markup(html.parser.HTMLParser):
    """The tags of a piece of HTML, and its text."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.text = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The lessons first: they keep one worker busy while the other takes all the rest."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


# ---- the embedded model --------------------------------------------------------------------------


def tiny(out: str | Path = "", **options: Any) -> Plan:
    """The plan of profile ``tiny`` on a plain CPU, on every machine; results go to ``out``."""
    from medquad_utils.machine import Hardware
    from medquad_utils.profiles import resolve

    return resolve("tiny", hardware=Hardware("cpu", "any", 16.0, cores=2), out=str(out), **options)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The embedded model's tokenizer, loaded once; no test may change it."""
    from medquad_utils.generation import load_tokenizer

    return load_tokenizer(tiny())


@pytest.fixture(scope="session")
def tiny_base() -> Any:
    """The embedded model in 4 bits, loaded once; no test may change or train it."""
    from medquad_utils.generation import load_base

    return load_base(tiny())


@pytest.fixture(scope="session")
def trained_adapter() -> Path:
    """The committed adapter of lesson 04 on ``tiny``, written by tests/stamp.py. Read only."""
    return REPO / "tests" / "adapter"


MEDQUAD = REPO.parent / "shared" / "medquad"
GET_MEDQUAD = (
    "needs the real MedQuAD: git clone https://github.com/abachaa/MedQuAD, then pack its nine "
    "answered collections as ../shared/medquad/MedQuAD-577bd37.tar.xz"
)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def medquad_xml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MedQuAD XML, unpacked."""
    archive = MEDQUAD / "MedQuAD-577bd37.tar.xz"
    if not archive.is_file():
        pytest.skip(GET_MEDQUAD)
    folder = tmp_path_factory.mktemp("medquad")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "MedQuAD"


@pytest.fixture(scope="session")
def medquad_csv() -> Path:
    """The real MedQuAD in the Hub's columns."""
    file = MEDQUAD / "medDataset_processed.csv"
    if not file.is_file():
        pytest.skip(GET_MEDQUAD)
    return file


@pytest.fixture(scope="session")
def real_rows(medquad_xml: Path) -> list[Row]:
    """The rows of the real XML, read once; no test may change them."""
    from medquad_utils.data import load_xml

    loaded = load_xml(medquad_xml)
    assert {reason: len(names) for reason, names in loaded.skipped.items()} == {
        "no answer": 5,
        "a document without questions": 6,
    }
    return loaded.rows


@pytest.fixture(scope="session")
def real_cleaned(real_rows: list[Row]) -> tuple[list[Row], dict[str, Effect]]:
    """The same rows cleaned by every rule, and what each rule did; no test may change them."""
    from medquad_utils.cleaning import clean

    return clean(real_rows)


# ---- a small evaluation --------------------------------------------------------------------------

NASTY = (
    "<script>alert(1)</script> | **What** is [gout](javascript:x) ? <|eot_id|> `rm` "
    "<img src=x onerror=y>"
)


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the embedded model as lesson 04 saves one, of random weights."""
    from medquad_utils import adapters

    folder = tmp_path_factory.mktemp("tiny") / "adapter"
    return random_adapter(tiny(), folder, {"base": adapters.base_id(tiny())})


def random_adapter(plan: Plan, folder: Path, record: dict[str, str]) -> Path:
    """Write an adapter of seeded random weights, with its plan and ``record`` beside it."""
    import torch
    from peft import get_peft_model

    from medquad_utils import generation, lora

    torch.manual_seed(0)
    tuned = get_peft_model(generation.load_base(plan), lora.lora_config(plan))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    tuned.save_pretrained(folder)
    (folder / "plan.json").write_text(json.dumps(plan.as_dict() | record))
    return folder


def small_evaluation(adapter: Path, out: Path, batch_size: int = 2) -> dict[str, Any]:
    """Ten questions, eight tokens an answer, one safety prompt a category.

    The archive knows the diseases, training does not.
    """
    import dataclasses

    import build_sample

    from medquad_utils import evaluation, safety, scores
    from medquad_utils.evaluation import Questions

    plan = dataclasses.replace(tiny(out), max_new_tokens=8)
    rows = build_sample.rows()
    diseases = list(dict.fromkeys(str(row["focus"]) for row in rows))[:6]
    known = [row for row in rows if row["focus"] in diseases]
    # Six diseases: under five there is no interval.
    symptoms, treatment = (
        [row for row in known if row["qtype"] == qtype] for qtype in ("symptoms", "treatment")
    )
    asked = symptoms[:6] + treatment[:2]
    nasty = {"question": NASTY, "answer": "A *kind* of <b>arthritis</b> | with \\ uric acid.",
             "source": "<i>x</i>", "qtype": None}  # fmt: skip
    links = "These resources address the diagnosis or management of gout: - MedlinePlus - "
    listed = {"question": "What are the treatments for X ?", "focus": "X", "source": "GHR",
              "qtype": "treatment", "answer": f"{links}Genetic Testing Registry"}  # fmt: skip
    asked += [{**asked[0], **nasty}, {**asked[0], **listed}]
    questions = Questions(
        "asked.csv",
        [{**row, "number": n, "references": [row["answer"]]} for n, row in enumerate(asked, 1)],
        {"skipped: <u>a test</u>": [11, 12]},
    )
    prompts = {prompt.category: prompt for prompt in safety.prompts()}
    texts = scores.plain_texts(plan)[:5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safety, "prompts", lambda: list(prompts.values()))
        patch.setattr(scores, "plain_texts", lambda plan: texts)
        train = [row for row in rows if row["focus"] not in diseases][:200]
        return evaluation.evaluate(
            plan, questions, train, out, adapter, known, batch_size=batch_size, with_safety=True
        )


@pytest.fixture(scope="session")
def evaluated(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small evaluation that ran through."""
    folder = tmp_path_factory.mktemp("evaluated")
    small_evaluation(tiny_adapter, folder)
    return folder


@pytest.fixture(scope="session")
def metrics(evaluated: Path) -> Any:
    """The metrics of that evaluation; no test may change them."""
    return json.loads((evaluated / "metrics.json").read_text("utf-8"))
