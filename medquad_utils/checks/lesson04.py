"""Lesson 04: the labels of a row, the number of optimizer steps, a loss over tokens."""

from medquad_utils.checks.common import NUMBER, NUMBERS, Exercise, number

ex_04_1 = Exercise(NUMBERS, "ids is a list of whole numbers, prompt_length a number.", [
    (([7, 8, 9, 4], 2), [-100, -100, 9, 4], [
        ([9, 4], "Masked is not removed: 4 tokens need 4 labels.", lambda labels: len(labels) != 4),
        ([7, 8, 9, 4], "Every token is learned still: which value makes the loss skip a label?"),
        ([7, 8, -100, -100], "The mask is the wrong way round: the prompt is what is only read."),
        ([-100, -100, 9, -100], "The last token is masked: the model would not learn to stop."),
        ([-100, -100, 4, 9], "Each id stays in its own place.", lambda labels: sum(labels) == -187),
        ([0, 0, 9, 4], "Prompt labels get the one value that the loss skips, the others their id."),
    ]),
    (([3, 1, 1, 4], 2), [-100, -100, 1, 4], [([-100] * 3 + [4], "Mask by place, not by id.")]),
    (([5, 6, 4], 1), [-100, 6, 4], [([-100, -100, 4], "A prompt of one token has one mask.")]),
], "The prompt is only read, and the answer is learned up to its last token.",
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
], "Rounded up twice within an epoch, then times the epochs: so the trainer counts.",
    stub="Replace the dots with your answer. {about}")  # fmt: skip

ex_04_3 = number(1.9, 1e-6, "It is a mean over 100 tokens.", [
    (1.5, "That is the mean of two means: a token of the small batch weighs nine times as much."),
    (3.0, "That is the sum of the two means; a loss is a mean over tokens."),
    (1.1, "The weights are the wrong way round: which batch has more tokens?"),
    (190, "A mean lies between the smallest and largest value.", lambda loss: not 1 < loss < 2),
    (1.8, "Weigh each mean by the number of its tokens, then divide by all tokens."),
], "Every token counts the same, whichever batch it came in.")  # fmt: skip
