"""Lesson 05: where an answer ends, a temperature, min-p."""

import math

from medquad_utils.checks.common import NAMES, NUMBERS, Exercise, number

ex_05_1 = Exercise(NUMBERS, "Return a list of ids.", [
    (([7, 8, 9], [1, 4]), [7, 8, 9], [([7, 8], "Without an end id, all of it is the answer.")]),
    (([7, 8, 4, 5, 5], [1, 4]), [7, 8], [
        ([7, 8, 4, 5, 5], "No end id, whichever it is, is in the answer.", lambda ids: 4 in ids),
        ([7, 8, 5, 5], "Nothing after the first end id is in the answer.", lambda ids: 5 in ids),
        ([8, 7], "Ids before the first end id must all stay, in their order."),
    ]),
    (([7, 1, 8, 4], [4, 1]), [7], [([7, 1, 8], "Of two end ids, the first in the row decides.")]),
    (([4, 5, 5], [1, 4]), [], [([4, 5, 5], "A row may begin with an end id: an empty answer.")]),
], "That is how a batch row is read: up to the first end id, and nothing after it.")  # fmt: skip

ex_05_2 = number(2 / math.log(10), 0.0037, "The ratio of two softmax probabilities depends on "
    "the difference of their logits and on the temperature.", [
    (0, "A temperature is above zero.", lambda t: t <= 0),
    (1, "At temperature 1 the ratio is e to the power of 2, about 7.4: sharper is asked for."),
    (math.log(10) / 2, "Nearly: the logits would be multiplied by this. Temperature divides."),
    (2, "Softmax uses powers of e: take the natural logarithm, math.log, not math.log10."),
    (0.2, "The first token is too probable: go up.", lambda t: t < 2 / math.log(10)),
    (5, "The first token is not probable enough: a lower temperature is needed."),
], "One division, and the odds are where you want them.")  # fmt: skip

ex_05_3 = Exercise(NAMES, "Return the list of tokens kept.", [
    (({"a": 0.125, "b": 0.1, "c": 0.09, "d": 0.02}, 0.5), {"a", "b", "c"}, [
        ([], "min_p is no fixed bar: no token reaches 0.5 here, and yet the first must stay."),
        (["d"], "The other way round: keep what is above the bar."),
        (["a", "b", "c", "d"], "The bar is min_p times the largest probability."),
    ]),
    (({"b": 0.02, "a": 0.9}, 0.1), {"a"}, [({"a", "b"}, "The largest need not come first.")]),
    (({"a": 0.5, "b": 0.25}, 0.5), {"a", "b"}, [({"a"}, "'At least' includes equal values.")]),
], "Where the model is sure, min-p keeps little; where it is not, it keeps a choice.")  # fmt: skip
