"""Lesson 02: bits of a weight in blocks of 128, from codes to weights, what fits into 12 GB."""

from medquad_utils.checks.common import TENSOR, Exercise, number, on_tensors

_CODES = [[n * 7 % 16 for n in range(first, first + 64)] for first in (0, 64)]
_BLOCKS = (_CODES, [0.5, 4.0], [n / 7.5 - 1 for n in range(16)])  # codes, scales, levels

ex_02_1 = number(4 + 8 / 128 + 32 / (128 * 256), 3e-4, "Count what 128 weights share, "
    "then what 256 scales share, and add it to the 4 bits of the code.", [
    (4.127, "That is the cost of blocks of 64. Here twice as many weights share one scale."),
    (4.25, "That is a scale of 32 bits. Double quantisation stores it in 8 bits."),
    (4.0625, "Almost: each super-block of 256 scales also stores one 32-bit number."),
    (4.06, "Near, but rounded too far: give four digits.", lambda bits: 4.058 < bits < 4.068),
    (4, "The code takes 4 bits. What does each weight's part of the scales cost?"),
], "Right: larger blocks are cheaper by a hair, and they round worse.")  # fmt: skip

ex_02_2 = Exercise(TENSOR, "Look at the shapes: It takes codes of shape (blocks, block), "
    "one scale for each block, and the levels; it returns weights of the codes' shape.", [
    (_BLOCKS, lambda codes, scales, levels: levels[codes] * scales[:, None], [
        (lambda c, s, levels: levels[c], "These are levels. The scale of each block is missing."),
        (lambda c, s, levels: c * s[:, None], "A code is a place in the list of levels, no value."),
        (lambda c, s, levels: levels[c] / s[:, None], "Quantising divided. What undoes it?"),
        (lambda c, s, levels: levels[c] * s.max(), "Every block has a scale of its own."),
        (lambda c, s, levels: levels[c] * s.flip(0)[:, None], "Which scale belongs to which row?"),
    ]),
], "Right: look the level up and scale it.", on_tensors, tolerance=5e-3)  # fmt: skip

ex_02_3 = number(12e9 * 8 / (4 + 8 / 64 + 32 / (64 * 256)) / 1e9, 0.1,
    "12 GB are 12e9 bytes of 8 bits; each weight takes the bits that you computed above.", [
    (2.4e10, "Right unit? The question asks for billions (8 B is 8.0).", lambda n: n > 1e9),
    (24, "That counts 4 bits a weight. The scales take room as well."),
    (21.33, "That counts 4.5 bits a weight. What does double quantisation save?"),
    (24.98, "Here a GB is 1e9 bytes, as on a data sheet, not 2**30."),
    (23, "Give at least one digit after the point.", lambda n: 22.5 < n < 24),
    (2.908, "Divide the bits of 12 GB, 8 for each byte, by the bits that one weight takes."),
], "Right. The embeddings, the adapters and the activations need room, too.")  # fmt: skip
