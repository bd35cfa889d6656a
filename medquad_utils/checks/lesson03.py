"""Lesson 03: the size of an adapter, its forward pass, two adapters of one price."""

from medquad_utils.checks.common import NUMBER, TENSOR, Exercise, number, on_tensors

_LAYER = ([1.0, -2.0, 0.5, 3.0, -1.0], *(  # x, W, A, B, alpha
    [[(columns * i + j) * 37 % 11 / 5 - 1 for j in range(columns)] for i in range(rows)]
    for rows, columns in ((7, 5), (3, 5), (7, 3))), 12.0)  # fmt: skip

ex_03_1 = Exercise(NUMBER, "Write down the shapes of A and B for a layer with that many inputs "
    "and outputs, and count the numbers in each.", [
    ((10, 7, 3), 3 * 10 + 7 * 3, [
        (10 * 7, "That counts the frozen weight W. Only A and B are trained."),
        (3 * 10 * 7, "No matrix of the adapter touches both inputs and outputs."),
        (10 + 7, "That is right for one rank only. What does a second one add?"),
        (2 * 3 * 10, "A and B have the same size only in a square layer."),
        (3 * 10, "Count the numbers of both matrices, A and B, and nothing else."),
    ]),
    ((4096, 14336, 16), 16 * (4096 + 14336), [(51, "It must fit every layer, not only one.")]),
], "Right: the adapter grows with the sides of the layer, W with their product.")  # fmt: skip

ex_03_2 = Exercise(TENSOR, "Which of A and B meets x first? "
    "W x, plus what goes down through A and up through B, times the scale.", [
    (_LAYER, lambda x, w, a, b, alpha: w @ x + alpha / 3 * b @ a @ x, [
        (lambda x, w, a, b, alpha: w @ x, "That is the base alone. The adapter is missing."),
        (lambda x, w, a, b, alpha: alpha / 3 * b @ a @ x, "That is the adapter's share alone."),
        (lambda x, w, a, b, alpha: w @ x + b @ a @ x, "The scale of the update is missing."),
        (lambda x, w, a, b, alpha: w @ x + alpha * b @ a @ x, "The rank belongs into the scale."),
        (lambda x, w, a, b, alpha: w @ x + alpha / 5 * b @ a @ x, "Which side of A is the rank?"),
        (lambda x, w, a, b, alpha: w @ x + 3 / alpha * b @ a @ x, "The scale is upside down."),
        (lambda x, w, a, b, alpha: alpha / 3 * (w + b @ a) @ x, "Add the scaled update to W x."),
    ]),
], "Right: this is the whole of LoRA's forward pass.", on_tensors, tolerance=1e-4)  # fmt: skip

ex_03_3 = number(98, 1e-9, "How many parameters does one rank cost on these two layers? "
    "How often does that fit into the budget?", [
    (16, "At the same rank two layers cost less than seven. So the rank can go up."),
    (98.46, "A rank is a whole number. Which way do you have to round?", lambda r: r % 1 > 0),
    (80, "That takes v_proj as square. See big.linears()."),
    (64, "A higher rank still fits.", lambda r: r < 98),
    (99, "That is over the budget."),
], "Right: six times the rank for one price. All layers make better use of it.")  # fmt: skip
