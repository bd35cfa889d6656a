"""What a look-up scores on the real MedQuAD: ROUGE-L of two baselines that need no training.

    python tests/benchmarks/look_up.py --xml MedQuAD     # a clone of the XML; some seconds

The split is the upstream recipe's: raw rows, drawn one by one, 90 % for training. All test rows are
scored, then the same without template answers. Lesson 06 reads the file that this script writes,
``medquad_utils/assets/measured/look_up.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medquad_utils import data, evaluation, files, splits
from medquad_utils.cleaning import is_boilerplate
from medquad_utils.files import Row
from medquad_utils.scores import rouge_l

KINDS = {"all rows": True, "without boilerplate": False}
PACKAGES = ("rouge-score", "scikit-learn", "scipy", "numpy")


def parts(rows: Sequence[Row], boilerplate: bool = True) -> tuple[list[Row], list[Row]]:
    """Return training and test rows, each row drawn on its own, nine in ten to training."""
    split = splits.split_by_row(rows, (0.9, 0.05, 0.05), 0)
    both = split.train, split.validation + split.test
    train, test = ([r for r in part if boilerplate or not is_boilerplate(r)] for part in both)
    return train, test


def look_up_scores(train: Sequence[Row], test: Sequence[Row], stem: bool) -> dict[str, Any]:
    """Return ROUGE-L (F1) of both baselines, answers uncut: arm -> cell."""
    given = {"nearest": evaluation.nearest_training_answers(train, test)}
    given["another disease"] = evaluation.other_disease_answers(train, test)
    references, diseases = [r["answer"] for r in test], [splits.focus_of(r) for r in test]
    columns = {a: {"rougeL": rouge_l(t, references, stem)} for a, t in given.items()}
    cells = {a: evaluation.measure("rougeL", c | {"disease": diseases}) for a, c in columns.items()}
    return cells


def measure(rows: Sequence[Row], kinds: Sequence[str] = tuple(KINDS)) -> dict[str, Any]:
    """Score both baselines on every kind of rows; returns what ``evaluation.measured`` reads."""

    def scores(stem: bool) -> Any:
        drawn = {kind: parts(rows, KINDS[kind]) for kind in kinds}
        return evaluation.rounded({k: look_up_scores(*both, stem) for k, both in drawn.items()})

    return {
        "what": "ROUGE-L of answers that need no training, on a random 90/10 split of raw rows",
        "data": "abachaa/MedQuAD at 577bd37",
        "rows": len(rows),
        "made_by": "tests/benchmarks/look_up.py",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "settings": "F1; rougeL with Porter stemming; 95 % intervals over diseases",
        "rougeL": scores(stem=True),
        "rougeL_unstemmed": scores(stem=False),  # as evaluate.load("rouge") by default
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns what was measured."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--xml", type=Path, metavar="DIR", help="a clone of MedQuAD")
    rows.add_argument("--smoke", action="store_true", help="the course's sample; writes nothing")
    options = parser.parse_args(arguments)
    found = measure(data.load_xml(data.SAMPLE if options.smoke else options.xml).rows)
    if not options.smoke:
        files.write_json(evaluation.MEASURED, found)
    return found


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
