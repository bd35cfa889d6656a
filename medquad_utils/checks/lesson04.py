"""Lesson 04: the logits in the loss, the number of optimizer steps, a loss over tokens."""

from medquad_utils.checks.common import NUMBER, NUMBERS, Exercise, number

ex_04_1 = Exercise(NUMBERS, "labels is a list of whole numbers, and so is the answer.", [
    (([-100, -100, 9, 4],), [1, 2], [
        ([2, 3], "Those are places of labels in the loss. Which logits are compared with them?"),
        ([3, 4], "The shift goes the other way: logits are made before the token that they score."),
        ([9, 4], "Those are labels. A position is a place in the list."),
        ([0, 1, 2], "Where the next label is masked, nothing is compared.",
         lambda places: isinstance(places, list) and 0 in places),
        ([1, 2, 3], "The logits at the last position have no next label.",
         lambda places: isinstance(places, list) and 3 in places),
        ([1], "Each label that is not -100 needs one position, the end of turn too."),
    ]),
    (([3, 0, 8],), [0, 1], [
        ([1], "An id may be 0. Compare with -100."),
        ([], "Without a mask, every token but the first is in the loss."),
    ]),
    (([-100, 5, 6, -100, -100, 8],), [0, 1, 4], [
        ([0, 1, 2, 3, 4], "A chat of several turns has several masked parts."),
    ]),
], "One position to the left of every label that is not -100.",
    stub="Replace the dots: the function returns nothing yet.")  # fmt: skip

ex_04_2 = Exercise(NUMBER, "The function returns the number of steps.", [
    ((1000, 4, 8, 3), 96, [
        (750, "That is the number of batches. How many of them make one step?"),
        (32, "That is right for one epoch."),
        (93.75, "That is not a whole number: there is no half step.", lambda steps: steps % 1 > 0),
        (93, "Too few: a batch or group that is not full counts, too.", lambda steps: steps < 96),
        (6000, "Too many: accumulated batches share one step."),
    ]),
    ((64, 8, 2, 1), 4, [(5, "64 rows in batches of 8, two batches a step: nothing is left over.")]),
    ((9, 4, 1, 1), 3, [(2, "The last batch is not full, and counts, too.")]),
], "Rounded up twice within an epoch, then times the epochs: so the trainer counts.",
    stub="Replace the dots with your answer. {about}")  # fmt: skip

ex_04_3 = number(1.9, 1e-6, "It is a mean over 100 tokens.", [
    (1.5, "That is the mean of two means: a token of the small batch weighs nine times as much."),
    (3.0, "That is the sum of the two means; a loss is a mean over tokens."),
    (1.1, "The weights are the wrong way round: which batch has more tokens?"),
    (190, "A mean lies between the smallest and largest value.", lambda loss: not 1 < loss < 2),
    (1.8, "Weigh each mean by the number of its tokens, then divide by all tokens."),
], "Every token counts the same, whichever batch it came in.")  # fmt: skip
