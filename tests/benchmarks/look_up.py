"""What needs no training already scores on the real MedQuAD: ROUGE-L of the two look-up arms on a split of the upstream kind.

    python tests/benchmarks/look_up.py --xml MedQuAD     # a clone of the XML; some minutes on one core

Raw rows, drawn one by one into 90 % training and 10 % test, all of the test rows scored; then the same with the template
answers (``cleaning.is_boilerplate``) out of both parts. Writes ``medquad_utils/assets/measured.json``, from which lesson 06 reads.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medquad_utils import data, evaluation
from medquad_utils.cleaning import Row, is_boilerplate
from medquad_utils.evaluation import MEASURED, rounded

REVISION = "577bd37"  # of abachaa/MedQuAD


def parts(rows: Sequence[Row], with_boilerplate: bool = True, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(training, test): every row drawn on its own, nine in ten to training."""
    split = data.split_by_row(rows, (0.9, 0.05, 0.05), seed)
    train, test = (
        [row for row in part if with_boilerplate or not is_boilerplate(row)] for part in (split.train, split.validation + split.test)
    )
    return train, test


def measure(rows: Sequence[Row]) -> dict[str, Any]:
    """``evaluation.look_up_scores`` with and without the template answers, and what they were measured with."""
    scores = {name: evaluation.look_up_scores(*parts(rows, keep)) for name, keep in (("all rows", True), ("without boilerplate", False))}
    return {
        "what": "ROUGE-L of answers that need no training, on a random 90/10 split of the raw rows",
        "data": f"abachaa/MedQuAD at {REVISION}",
        "rows": len(rows),
        "made_by": "tests/benchmarks/look_up.py",
        "versions": {name: importlib.metadata.version(name) for name in ("rouge-score", "scikit-learn", "scipy", "numpy")},
        "rougeL": rounded(scores),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--xml", type=Path, required=True, metavar="DIR", help="a clone of MedQuAD")
    found = measure(data.load_xml(parser.parse_args().xml).rows)
    data.write_json(MEASURED, found)
    for kind, arms in found["rougeL"].items():
        print(kind, {arm: f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}], n={cell['n']:,}" for arm, cell in arms.items()})
