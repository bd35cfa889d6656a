"""How far the score moves between training runs: lesson 04's adapter trained with several seeds.

    python tests/benchmarks/seeds.py                       # tiny, about five minutes on two cores
    python tests/benchmarks/seeds.py --seeds 2 --steps 2 --smoke      # writes nothing

Data, split and settings are those of lesson 04. Only the seed of the training changes: the first
values of the adapters and the order of the rows. Lesson 06 reads the file that this script writes,
``medquad_utils/assets/measured/seeds.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

from medquad_utils import evaluation, files, generation, training
from medquad_utils.data import prepare
from medquad_utils.profiles import Plan, resolve

FILE = common.RESULTS / "seeds.json"
SCORES = ("facts_complete", "rougeL")


def scored(plan: Plan, seed: int, folder: Path) -> dict[str, Any]:
    """Train with ``seed``, answer the test rows; return score -> cell."""
    tokenizer = generation.load_tokenizer(plan)
    rows = training.select(plan, tokenizer, prepare(plan))
    again = dataclasses.replace(plan, seed=seed)
    quiet = {"eval_strategy": "no", "save_strategy": "no"}
    base = generation.load_base(plan)
    trainer = training.build_trainer(again, base, tokenizer, rows, folder, **quiet)
    trainer.train()
    model = trainer.model.eval()
    columns = evaluation.answer_columns(model, tokenizer, rows.test, plan.max_new_tokens)
    cells = evaluation.summary({"tuned": columns}, versus=())["arms"]["tuned"]
    return {score: cells[score] for score in SCORES if score in cells}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns what was measured."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="0 is as many as the epochs need")
    parser.add_argument("--smoke", action="store_true", help="writes nothing")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        plan = resolve(asked.profile, max_steps=asked.steps, out=folder)
        found = {str(seed): scored(plan, seed, Path(folder)) for seed in range(asked.seeds)}
    about = {"what": "held-out scores of one recipe by training seed", "profile": asked.profile}
    result: dict[str, Any] = common.record() | about | {"seeds": evaluation.rounded(found)}
    if not asked.smoke:
        files.write_json(FILE, result)
    return result


if __name__ == "__main__":
    print(json.dumps(main()["seeds"], indent=1))
