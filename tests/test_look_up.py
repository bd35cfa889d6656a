"""What needs no training scores on the real MedQuAD: computed again, it is what the asset and DATA.md say."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from conftest import benchmark

from medquad_utils import arms, evaluation
from medquad_utils.cleaning import Row, is_boilerplate
from medquad_utils.scores import rouge_l

# DATA.md of the course, counted by other people in another way.
KNOWN = {
    "all rows": {"nearest": 0.32, "another disease": 0.29},
    "without boilerplate": {"nearest": 0.23, "another disease": 0.19},
}


@pytest.fixture(scope="module")
def look_up() -> ModuleType:
    module: ModuleType = benchmark("look_up")
    return module


@pytest.mark.parametrize("kind", KNOWN)
def test_the_asset_is_what_all_rows_say_and_close_to_what_was_known(kind: str, look_up: ModuleType, real_rows: list[Row]) -> None:
    train, test = look_up.parts(real_rows, kind == "all rows")
    references = [row["answer"] for row in test]
    texts = {"nearest": arms.nearest_training_answers(train, test), "another disease": arms.other_disease_answers(train, test)}
    for arm, cell in evaluation.measured()["rougeL"][kind].items():
        values = rouge_l(texts[arm], references)
        assert cell["n"] == len(values)
        assert cell["mean"] == pytest.approx(values.mean(), abs=1e-3)
        half = 1.96 * values.std() / len(values) ** 0.5
        assert (cell["low"], cell["high"]) == pytest.approx((values.mean() - half, values.mean() + half), abs=2e-3)
        assert abs(cell["mean"] - KNOWN[kind][arm]) <= 0.02


def test_the_parts_are_of_the_upstream_kind(look_up: ModuleType, real_rows: list[Row]) -> None:
    train, test = look_up.parts(real_rows)
    assert len(train) + len(test) == len(real_rows) == evaluation.measured()["rows"]
    assert len(test) / len(real_rows) == pytest.approx(0.1, abs=0.005)
    assert not any(map(is_boilerplate, look_up.parts(real_rows, False)[1]))


def test_the_asset_says_what_it_was_measured_with() -> None:
    found: dict[str, Any] = evaluation.measured()
    assert "577bd37" in found["data"]
    assert {"rouge-score", "scikit-learn", "scipy"} <= set(found["versions"])
    assert list(found["rougeL"]) == list(KNOWN)
