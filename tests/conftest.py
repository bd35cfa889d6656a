"""Shared fixtures. Nothing here reaches the network, and nothing writes into the checkout."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from medquad_utils.cleaning import Effect, Row

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: waiting threads do not spin

# Alike on every machine, however slow: no deadline, the same examples every time.
hypothesis.settings.register_profile(
    "course", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("course")

REPO = Path(__file__).parent.parent
MEDQUAD = REPO.parent / "shared" / "medquad"
GET_MEDQUAD = (
    "needs the real MedQuAD: git clone https://github.com/abachaa/MedQuAD, then pack its nine answered collections as "
    "../shared/medquad/MedQuAD-577bd37.tar.xz"
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
    assert loaded.skipped == []
    return loaded.rows


@pytest.fixture(scope="session")
def real_cleaned(real_rows: list[Row]) -> tuple[list[Row], dict[str, Effect]]:
    """The same rows cleaned by every rule, and what each rule did; no test may change them."""
    from medquad_utils.cleaning import clean

    return clean(real_rows)
