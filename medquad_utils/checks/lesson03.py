"""Lesson 03: alpha at another rank, an adapter as one matrix, two adapters of one price."""

from math import sqrt

from medquad_utils.checks.common import NUMBER, TENSOR, Exercise, number, on_tensors

_LAYER = (*(  # W, A, B, alpha
    [[(columns * i + j) * 37 % 11 / 5 - 1 for j in range(columns)] for i in range(rows)]
    for rows, columns in ((7, 5), (3, 5), (7, 3))), 12.0)  # fmt: skip

ex_03_1 = Exercise(NUMBER, "Look at the two figures of the section on rank and alpha. "
    "Which rule keeps the size?", [
    ((16, 4, 36), 48, [
        (16, "A fixed alpha keeps the progress. The size falls."),
        (144, "That keeps alpha / r. The size of the update grows."),
        (16 / 3, "That goes the wrong way: a higher rank needs a larger alpha here."),
        (16 / 9, "That goes the wrong way, and too far."),
        (48 / 16, "That is the factor. By what do you multiply it?"),
        (8, "It must start from the alpha that the run used."),
    ]),
    ((32, 16, 8), 32 * sqrt(0.5), [(48, "It must hold for a lower rank, too.")]),
], "Right: with this alpha the first update is as large as before.")  # fmt: skip

ex_03_2 = Exercise(TENSOR, "The layer computes W x + (alpha / r) B (A x). "
    "Which single matrix gives the same for every x?", [
    (_LAYER, lambda w, a, b, alpha: w + alpha / 3 * b @ a, [
        (lambda w, a, b, alpha: w, "That is the base alone. The adapter is missing."),
        (lambda w, a, b, alpha: alpha / 3 * b @ a, "That is the update alone. Add it to W."),
        (lambda w, a, b, alpha: w + b @ a, "The scale of the update is missing."),
        (lambda w, a, b, alpha: w + alpha * b @ a, "The rank belongs into the scale."),
        (lambda w, a, b, alpha: w + alpha / 5 * b @ a, "Which side of A is the rank?"),
        (lambda w, a, b, alpha: w + 3 / alpha * b @ a, "The scale is upside down."),
        (lambda w, a, b, alpha: alpha / 3 * (w + b @ a), "The scale is of the update, not of W."),
        (lambda w, a, b, alpha: 0 * w, "Add the scaled product of B and A to W."),
    ]),
], "Right: this is what merging an adapter means. Lesson 08 does it with 4-bit weights.",
    on_tensors, tolerance=1e-4)  # fmt: skip

ex_03_3 = number(98, 1e-9, "How many parameters does one rank cost on these two layers? "
    "How often does that fit into the budget?", [
    (16, "At the same rank two layers cost less than seven. So the rank can go up."),
    (98.46, "A rank is a whole number. Which way do you have to round?", lambda r: r % 1 > 0),
    (80, "That takes v_proj as square. See big.linears()."),
    (64, "A higher rank still fits.", lambda r: r < 98),
    (99, "That is over the budget."),
], "Right: six times the rank for the same price.")  # fmt: skip
