"""Score predictions and check exercises, with a hint for a wrong answer and never the solution.

Each exercise is one entry of its lesson's module: what is right, and a table of wrong answers.
"""
# ruff: noqa: F401

from medquad_utils.checks.common import Exercise, NotYet, attempt, predict
from medquad_utils.checks.lesson01 import ex_01_1, ex_01_2, ex_01_3
from medquad_utils.checks.lesson02 import ex_02_1, ex_02_2, ex_02_3
from medquad_utils.checks.lesson03 import ex_03_1, ex_03_2, ex_03_3
from medquad_utils.checks.lesson04 import ex_04_1, ex_04_2, ex_04_3
from medquad_utils.checks.lesson05 import ex_05_1, ex_05_2, ex_05_3
from medquad_utils.checks.lesson06 import ex_06_1, ex_06_2, ex_06_3
from medquad_utils.checks.lesson07 import ex_07_1, ex_07_2, ex_07_3
from medquad_utils.checks.lesson08 import ex_08_1, ex_08_2, ex_08_3
from medquad_utils.checks.lesson09 import ex_09_1, ex_09_2, ex_09_3

EXERCISES = {name: value for name, value in globals().items() if isinstance(value, Exercise)}
