"""Lesson 02: bits of a weight with a zero point, Q4_1's round trip, the memory of 70 B."""

from typing import Any

from medquad_utils.checks.common import TENSOR, Exercise, number, on_tensors

_POSITIVE = ([0.11, 0.52, 0.23, 0.61, 0.34, 0.47, 0.18, 0.29],)
_SIGNED = ([-0.62, 0.05, 0.33, -0.17, 0.48, -0.41, 0.21, -0.08],)


def _q4_1(block: Any, steps: int = 15) -> Any:
    low, step = block.min(), (block.max() - block.min()) / steps
    return low + ((block - low) / step).round() * step


ex_02_1 = number(4 + 16 / 128 + 4 / 128, 5e-3, "Add to the 4 bits of the code a weight's share "
    "of what its group stores.", [
    (4.125, "That is the code and the scale. The zero point takes bits as well."),
    (4.03125, "That is the code and the zero point. The scale takes bits as well."),
    (4.3125, "Divide by the size of a group of GPTQ, not by that of a block of NF4."),
    (24, "All weights of a group share one scale and one zero point."),
    (4, "The code takes 4 bits. What does each weight's part of the group cost?"),
], "Right. It is hardly more than NF4 with double quantisation takes.")  # fmt: skip

_ROWS = [
    (lambda block: _q4_1(block, 16), "Codes from 0 to 15 are 16 values. How many steps lie "
     "between them?"),
    (lambda block: _q4_1(block) - block.min(), "Almost: the smallest weight is missing when you "
     "read the codes back."),
    (lambda block: ((block - block.min()) / (block.max() - block.min()) * 15).round(),
     "These are codes. Read them back: how large is one step, and where does it begin?"),
    (lambda block: (block / block.abs().max() * 7).round() / 7 * block.abs().max(), "That is "
     "int4 of this lesson. Here the smallest weight gets code 0, even if it is above zero."),
    (lambda block: block, "These are the exact weights. Round them to a whole code in between."),
    (lambda block: block * 0, "Check each step: shift, scale, round to the nearest code, back."),
]  # fmt: skip
ex_02_2 = Exercise(TENSOR, "It takes a tensor of weights and returns a tensor of the same shape: "
    "shift, scale, round, and the way back.", [
    (_POSITIVE, _q4_1, _ROWS), (_SIGNED, _q4_1, [(lambda block: _q4_1(block.abs()),
    "Right for positive weights. The minimum of this block is below zero.")]),
], "Right: all 16 codes are in use, whatever the sign.", on_tensors, tolerance=2e-4)  # fmt: skip

ex_02_3 = number((68.5 * (4 + 8 / 64 + 32 / (64 * 256)) + 2.1 * 16) / 8, 0.12,
    "Two products and a sum: bits of the linear layers, bits of the others, 8 bits to a byte.", [
    (141.2, "That is the model in 16 bits. The linear layers are stored in 4 bits."),
    (36.42, "That stores all weights in 4 bits. The others stay in 16."),
    (35.34, "That is the linear layers alone. The others take room, too."),
    (42.73, "That counts 4.5 bits a weight. What does double quantisation save?"),
    (38.45, "That counts 4 bits a weight. The scales take room as well."),
    (36.83, "Here a GB is 1e9 bytes, as on a data sheet, not 2**30."),
    (316, "Right unit? The question asks for bytes, and this looks like bits."),
    (4.2, "Add both parts: the linear layers at their bits, and the others at 16 bits each."),
], "Right. Llama-3-70B fits a card of 48 GB before training begins.")  # fmt: skip
