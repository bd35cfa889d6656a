"""Checks that a learner meets: kind scores for predictions, and exercise checkers that hint but never tell.

A checker takes an answer, accepts any correct one, and raises ``NotYet`` with a hint for a wrong one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from medquad_utils.profiles import CourseError


class NotYet(CourseError):
    """An exercise that is not solved yet; the message is a hint."""


PERCENT, ZERO_TO_ONE = ("%", "percent"), ("ROUGE-L",)
"""The units of ``predict`` that are easily mixed up: 50 and 0.5."""


def predict(guess: Any, truth: float, unit: str, because: str) -> str:
    """Score a guess kindly, by its factor from the truth, and say why the truth is what it is; what is no number is not scored."""
    number = _finite(guess)
    if number is None:
        said = f"No score this time: my_guess is {_named(guess)}, and a number such as 2.5 was expected; it"
        return f"{said} is {truth:,.4g} {unit}. {because}"
    return f"You said {number:,.4g} {unit}; it is {truth:,.4g} {unit}. {_verdict(number, truth)}. {_mixed_up(number, truth, unit)}{because}"


def _verdict(guess: float, truth: float) -> str:
    if guess == truth:
        return "Spot on"
    if truth <= 0:
        return "Not a bit of it, then"
    if guess <= 0:
        return "A guess above zero would have been closer"
    factor = max(guess / truth, truth / guess)
    return (
        "Spot on" if factor <= 1.1
        else "Close" if factor <= 1.5
        else "The right order of magnitude" if factor <= 5
        else "A surprise, then: that is what a prediction is for"
    )  # fmt: skip


def _mixed_up(guess: float, truth: float, unit: str) -> str:
    """A word to who wrote a share where percent are asked for, or the other way round, if that explains the distance."""
    meant = 100 * guess if unit in PERCENT and 0 < guess <= 1 else guess / 100 if unit in ZERO_TO_ONE and guess > 1 else guess
    nearer = abs(meant - truth) < abs(guess - truth)
    return f"Or did you mean {meant:,.4g} {unit}? That is how it is written here. " if nearer else ""


def attempt(checker: Callable[[Any], str], answer: Any) -> None:
    """Print what ``checker`` says to ``answer``: praise, or the hint of a ``NotYet``, so that the notebook runs on."""
    try:
        print(checker(answer))
    except NotYet as hint:
        print(f"Not yet. {hint}")


def _need(right: bool, hint: str) -> None:
    if not right:
        raise NotYet(hint)


def _plain(value: Any) -> Any:
    """Values of numpy and torch as Python's own numbers, texts and lists; a tuple becomes a list; all else stays."""
    if hasattr(value, "tolist") and not isinstance(value, type):
        value = value.tolist()
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _finite(value: Any) -> float | None:
    """``value`` as a float if it is a finite number, be it written as a text or alone in a list; else None."""
    value = _plain(value)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _named(value: Any) -> str:
    """What a message calls a value that is not what it should be: its type, or the value itself where it is short."""
    if value is ...:
        return "still three dots"
    return f"{value!r:.40}" if value is None or isinstance(value, str | float | bool) else f"of type {type(value).__name__}"


def _number(answer: Any, hint: str) -> float:
    """``answer`` as a finite float; a stub (``None``, ``...``) or anything else gets ``hint``."""
    if answer is None or answer is ...:
        raise NotYet(f"Replace the dots with your answer. {hint}")
    number = _finite(answer)
    if number is None:
        raise NotYet(f"Expected a number, and yours is {_named(answer)}. {hint}")
    return number


def _letters(answer: Any, known: str, hint: str) -> set[str]:
    """The letters of a choice such as "ae", "a, e", {"a", "e"}; ``known`` are those to choose from."""
    _need(answer is not None and answer is not ..., f"Replace the dots with your answer. {hint}")
    chosen = _plain(answer)
    _need(isinstance(chosen, str | list | set | frozenset), f"Expected letters, and yours is {_named(chosen)}. {hint}")
    letters = {c for part in chosen for c in str(part).lower() if c.isalpha()}
    _need(bool(letters) and letters <= set(known), f"Choose from {known[0]} to {known[-1]}. {hint}")
    return letters


def _function(answer: Any, hint: str) -> Callable[..., Any]:
    """``answer`` if it can be called; else a hint."""
    if not callable(answer):
        raise NotYet(f"Expected a function by its name, and yours is {_named(answer)}. {hint}")
    return answer  # type: ignore[no-any-return]


def _call(answer: Callable[..., Any], *arguments: Any, hint: str) -> Any:
    """What ``answer`` returns; an error inside it becomes ``hint``."""
    try:
        return answer(*arguments)
    except NotYet:  # a function that we handed in, such as log_p, was used wrongly, and says so
        raise
    except Exception as error:  # a learner's function may fail in any way
        raise NotYet(f"Your function stopped with {type(error).__name__}: {error}. {hint}") from None


def _try(answer: Callable[..., Any], *arguments: Any, hint: str) -> Any:
    """What ``answer`` returns; an error inside it, or nothing returned, becomes ``hint``."""
    result = _call(answer, *arguments, hint=hint)
    if result is None or result is ...:
        raise NotYet(f"Your function returns nothing yet. {hint}")
    return result


def _items(value: Any, hint: str) -> list[Any]:
    """The elements of a list, tuple, set, array or generator, as Python's own values; anything else gets ``hint``."""
    value = _plain(value)
    _need(hasattr(value, "__iter__") and not isinstance(value, str | type), hint)
    return list(_plain(_call(list, value, hint=hint)))


def _tensor(value: Any, hint: str) -> Any:
    """A float32 tensor of ``value``: a tensor, an array or lists of numbers; anything else gets ``hint``."""
    import torch

    try:
        return torch.tensor(_plain(value), dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise NotYet(f"Expected a tensor back, got {type(value).__name__}. {hint}") from None


def _well_done(what: str) -> str:
    return f"✓ {what}"


# ---- lesson 01 ------------------------------------------------------------------------------------------------------


def ex_01_1(answer: Any) -> str:
    """The share of tokens lost when rows of 60, 90, 120, 200, 300 and 900 tokens meet a limit of 256 and too-long ones go."""
    hint = "Count the tokens of the rows that go, and divide by the tokens of all six rows."
    share = _number(answer, f"It is a share, 0 to 1. {hint}")
    near = 5e-3
    _need(0 <= share <= 1, f"A share lies between 0 and 1, not {share:g}. {hint}")
    _need(abs(share - 1 / 3) > near, "That is the share of rows. Long rows hold more tokens than short ones: what share of tokens is lost?")
    _need(abs(share - 470 / 1670) > near, "That is the share that stays. How much is lost?")
    _need(abs(share - 688 / 1670) > near, "That is what cutting loses: only the ends. Here the whole of a too-long row goes.")
    _need(abs(share - 900 / 1670) > near, "More than one row is longer than 256.")
    _need(not near < abs(share - 1200 / 1670) < 0.02, "Nearly: give two digits after the point, rounded.")
    _need(abs(share - 1200 / 1670) < near, hint)
    return _well_done("Right: two rows of six, and most of the tokens. Count both before you choose a limit.")


def ex_01_2(answer: Any) -> str:
    """``answer(train, test)``: the share of test rows, 0 to 1, whose disease is also in training."""
    function = _function(answer, "Write a function of train and test, two lists of rows, that returns a share.")

    def rows(*names: str) -> list[dict[str, Any]]:
        return [{"question": f"What causes {name} ?", "answer": "Short.", "qtype": "causes", "focus": name} for name in names]

    def leak(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> float:
        found = _try(function, train, test, hint="It gets two lists of rows; look at one row with data.focus_of.")
        return _number(found, "The function returns the share as a number.")

    train = rows("gout", "mumps", "mumps", "croup", "croup", "croup")
    test = rows("gout", "gout", "gout", "measles", "measles")
    found, near = leak(train, test), 1e-6
    _need(abs(found - 1 / 6) > near, "That is a share of the training rows. The question is about the test rows.")
    diseases = min(abs(found - share) for share in (1 / 2, 1 / 3, 1 / 4))  # of those in test, in training, in both
    _need(diseases > near, "That is a share of diseases. Three test rows about one disease are three rows.")
    _need(abs(found - 0.2) > near, "Each shared disease was counted once. Count the test rows that are about it.")
    _need(abs(found - 0.4) > near, "That is the share that does not leak.")
    _need(abs(found - 3) > near, "That is a number of rows. A share is divided by all test rows.")
    _need(abs(found - 60) > near, "Right, but in percent: a share lies between 0 and 1.")
    _need(abs(found - 0.6) < near, f"Two of five test rows are new to training, the others are not; your function says {found:g}.")
    _need(abs(leak(rows("Gout"), rows("gout", "GOUT")) - 1) < near, '"Gout" and "gout" are one disease: compare data.focus_of(row).')
    _need(abs(leak(rows("gout"), rows("mumps"))) < near, "If no disease is shared, the leak is 0.")
    return _well_done("Right: count test rows, compare normalised names, divide by all test rows.")


def ex_01_3(answer: Any) -> str:
    """``answer(text)`` cuts footnote marks, numbers in square brackets, with the space before them; all else stays."""
    rule = _function(answer, "A rule takes the text of an answer and returns what is kept of it.")

    def apply(text: str) -> str:
        found = _try(rule, text, hint="It gets one text and returns a text.")
        _need(isinstance(found, str), f"A rule returns the text that is kept, not {type(found).__name__}.")
        return str(found)

    plain = "Rest the joint, and drink enough  (2 to 3 litres)."
    _need(apply(plain) == plain, "A text without any mark was changed. A rule leaves alone what it does not mean.")
    kept = "The level [see below] and 25[OH] vitamin D were low."
    _need(apply(kept) == kept, "Square brackets that hold words were cut, too. A footnote mark holds digits alone.")
    found = apply("Gout is common.[9184] It hurts.")
    _need(found != "", "The whole answer was dropped for one mark. Cut the mark, and keep the rest.")
    _need("9184" not in found, "A mark of four digits is still there: [9184].")
    _need("[" not in found and "]" not in found, "The number is gone, its brackets are not.")
    _need(found == "Gout is common. It hurts.", f"Something else was cut, or a space was added: your rule makes {found!r}.")
    found = apply("Surgery may help. [1] [2]")
    _need("[2]" not in found, "Two marks stand side by side, and one of them stayed.")
    _need(found == "Surgery may help.", f"A space before a mark was left behind: your rule makes {found!r}.")
    return _well_done("Right: narrow enough to touch nothing else. Count what a rule changes, and read some of it, before you trust it.")


# ---- lesson 02 ------------------------------------------------------------------------------------------------------


def ex_02_1(answer: Any) -> str:
    """Bits a weight costs in NF4 with double quantisation when 128 weights, not 64, share a scale."""
    hint = "Count what 128 weights share, then what 256 scales share, and add it to the 4 bits of the code."
    bits = _number(answer, hint)
    near = 1e-3
    _need(abs(bits - 4.127) > near, "That is the cost of blocks of 64. Here twice as many weights share one scale.")
    _need(abs(bits - 4.25) > near, "That is a scale of 32 bits for each block. Double quantisation stores it in 8 bits.")
    _need(abs(bits - 4.0625) > 2e-4, "Almost: each super-block of 256 scales also stores one 32-bit number.")
    _need(abs(bits - 4) > near, "That is the code alone. The scales are stored too.")
    _need(abs(bits - 0.0635) > near, "That is what the scales cost. Add the code itself.")
    _need(abs(bits - 4.5) > near, "That is blocks of 64 with scales of 32 bits. Here the blocks are larger, and a scale takes 8 bits.")
    _need(not 3e-4 < abs(bits - 4.063477) < 5e-3, "Near, but rounded too far to tell whether all was counted: give four digits.")
    _need(abs(bits - 4.063477) < 3e-4, hint)
    return _well_done("Right: larger blocks are cheaper by a hair, and they round worse.")


def ex_02_2(answer: Any) -> str:
    """A function (codes, scales, levels) -> weights that undoes block quantisation, up to the rounding."""
    hint = "It takes codes of shape (blocks, block), one scale for each block, and the levels; it returns weights of the codes' shape."
    function = _function(answer, hint)
    import torch

    levels = torch.linspace(-1, 1, 16)
    codes = (torch.arange(2 * 64) * 7 % 16).reshape(2, 64)
    scales = torch.tensor([0.5, 4.0])
    truth = levels[codes] * scales[:, None]
    weights = _tensor(_try(function, codes, scales, levels, hint=f"Look at the shapes: {hint}"), hint)
    _need(weights.numel() == truth.numel(), f"Expected {truth.numel()} weights back, got {weights.numel()}. {hint}")
    weights = weights.reshape(truth.shape)

    def same(other: Any) -> bool:
        return bool(torch.allclose(weights, other.float(), atol=5e-3))

    _need(not same(levels[codes]), "These are the levels, between -1 and 1. The scale of each block is missing.")
    _need(not same(codes * scales[:, None]), "A code is a place in the list of levels, not a value. Look the level up first.")
    _need(not same(levels[codes] / scales[:, None]), "Quantising divided by the scale. What undoes a division?")
    _need(not same(levels[codes] * scales.max()), "Every block has a scale of its own; you used one for all.")
    _need(same(truth), "The shapes are right, the values are not. Which scale belongs to which row of codes?")
    return _well_done("Right: look the level up, multiply by the block's scale. This runs before every matrix product of a 4-bit model.")


def ex_02_3(answer: Any) -> str:
    """Billions of weights in linear layers that fit into 12 GB in NF4 with double quantisation."""
    hint = "12 GB are 12e9 bytes of 8 bits; each weight takes the bits that you computed above."
    billions = _number(answer, hint)
    _need(not 1e9 < billions < 1e11, "Right unit? The question asks for billions (8 B is 8.0).")
    _need(abs(billions - 24) > 0.05, "That counts 4 bits a weight. The scales take room as well.")
    _need(abs(billions - 21.33) > 0.05, "That counts 4.5 bits a weight. What does double quantisation save?")
    _need(abs(billions - 6) > 0.05, "That is how many fit in 16 bits.")
    _need(abs(billions - 12) > 0.05, "That is one byte for each weight. How many bits does NF4 need?")
    _need(abs(billions - 24.978) > 0.05, "Here a GB is 1e9 bytes, as on a data sheet, not 2**30.")
    _need(abs(billions - 2.908) > 0.02, "Bytes or bits? A byte holds 8 bits.")
    _need(abs(billions - 23.262) < 0.1, f"{hint} Give at least one digit after the point.")
    return _well_done("Right. And then there are still the embeddings, the adapters and the activations to house.")


# ---- lesson 03 ------------------------------------------------------------------------------------------------------


def ex_03_1(answer: Any) -> str:
    """A function (inputs, outputs, r) -> parameters of one layer's adapter."""
    hint = "Write down the shapes of A and B for a layer with that many inputs and outputs, and count the numbers in each."
    function = _function(answer, hint)
    cases = ((6, 4, 1), (4096, 14336, 16), (10, 10, 3))
    found = [_try(function, *case, hint=hint) for case in cases]
    numbers = [_number(value, f"The function must return the count. {hint}") for value in found]

    def same(formula: Callable[[int, int, int], float]) -> bool:
        return numbers == [formula(*case) for case in cases]

    _need(not same(lambda i, o, r: i * o), "That counts the frozen weight W. Only A and B are trained.")
    _need(not same(lambda i, o, r: r * i * o), "That multiplies all three sizes. No matrix of the adapter touches both inputs and outputs.")
    _need(not same(lambda i, o, r: i + o), "That is right for one rank only. What does a second one add?")
    _need(not same(lambda i, o, r: r * r * i * o), "A and B are two matrices beside each other: are their numbers added or multiplied?")
    _need(not same(lambda i, o, r: i * o + r * (i + o)), "That includes the frozen weight W. Count only what is trained.")
    _need(not (same(lambda i, o, r: r * i) or same(lambda i, o, r: r * o)), "That is one matrix. The adapter has a second one.")
    _need(not same(lambda i, o, r: 2 * r * i), "A and B have the same size only in a square layer.")
    _need(same(lambda i, o, r: r * (i + o)), hint)
    return _well_done("Right: the adapter grows with the two sides of the layer, the layer with their product.")


def ex_03_2(answer: Any) -> str:
    """A function (x, W, A, B, alpha) -> y: the forward pass of a layer with its adapter."""
    hint = "W x, plus what goes down through A and up through B, times the scale."
    function = _function(answer, hint)
    import torch

    generator = torch.Generator().manual_seed(3)
    x, w, a, b = (torch.randn(*size, generator=generator) for size in ((5,), (7, 5), (3, 5), (7, 3)))
    alpha, r = 12.0, 3
    y = _tensor(_try(function, x, w, a, b, alpha, hint=f"Which of A and B meets x first? {hint}"), hint)
    _need(y.numel() == 7, f"Expected one number for each of the 7 outputs, got shape {tuple(y.shape)}. {hint}")
    y = y.reshape(-1)
    base, update = w @ x, b @ (a @ x)

    def same(other: Any) -> bool:
        return bool(torch.allclose(y, other, atol=1e-4, rtol=1e-4))

    _need(not same(base), "That is the base alone. The adapter is missing.")
    _need(not same(update) and not same(alpha / r * update), "That is the adapter's share alone. The frozen layer still speaks.")
    _need(not same(base + update), "The update comes in at its raw size. The scale is missing.")
    _need(not same(base + alpha * update), "You scaled by alpha. The rank belongs into the scale as well.")
    _need(not any(same(base + alpha / n * update) for n in (5, 7)), "You divided by the wrong size. Which side of A is the rank?")
    _need(not same(base + r / alpha * update), "The scale is upside down: a larger alpha should make a larger change.")
    _need(not same(alpha / r * (base + update)), "The scale is for the update only. The frozen layer stays as it is.")
    _need(same(base + alpha / r * update), f"The shape is right, the values are not. {hint}")
    return _well_done("Right: this is the whole of LoRA's forward pass.")


def ex_03_3(answer: Any) -> str:
    """The highest rank on q_proj and v_proj of the 8 B Llama that costs no more than rank 16 on all seven layers."""
    hint = "How many parameters does one rank cost on these two layers? How often does that fit into the budget?"
    rank = _number(answer, hint)
    from medquad_utils.lora import adapter_parameters
    from medquad_utils.profiles import PROFILES

    shape = PROFILES["llama-8b"].shape
    budget = adapter_parameters(shape, 16)
    one = adapter_parameters(shape, 1, ("q_proj", "v_proj"))
    most = budget // one
    _need(rank != 16, "At the same rank two layers cost less than seven. So the rank can go up.")
    _need(abs(rank - budget) > 0.5 and abs(rank - one) > 0.5, "That is a number of parameters. The question asks for a rank.")
    _need(rank == int(rank), "A rank is a whole number. Which way do you have to round to stay within the budget?")
    _need(rank != most + 1, "Close, but this rank is just over the budget.")
    _need(rank != budget // (shape.layers * 4 * shape.hidden), "That takes v_proj as square. See big.linears().")
    _need(rank != budget // (one // shape.layers), "That counts one block for the two layers and all blocks for the budget.")
    _need(rank >= most, f"A higher rank still fits. {hint}")
    _need(rank == most, f"That is over the budget. {hint}")
    return _well_done("Right: six times the rank for the same price. The QLoRA paper found that it is better spent on all layers.")


# ---- lesson 04 ------------------------------------------------------------------------------------------------------


def ex_04_1(answer: Any) -> str:
    """``answer(ids, prompt_length)`` gives the labels of one row: the prompt masked, the rest learned."""
    function = _function(answer, "Write a function of ids and prompt_length that returns a list of labels.")
    for ids, prompt_length in (([7, 8, 9, 4], 2), ([5, 6, 4], 1), ([3, 1, 2, 2, 1, 4], 4)):
        found = _call(function, list(ids), prompt_length, hint="ids is a list of whole numbers, prompt_length a number.")
        _need(found is not None and found is not ..., "Replace the dots: the function returns nothing yet.")
        labels = _items(found, f"Expected a list of labels, got {type(found).__name__}.")
        _need(all(isinstance(label, int | float) for label in labels), "Expected a list of labels, each of them one number.")
        prompt, rest = labels[:prompt_length], labels[prompt_length:]
        _need(len(labels) == len(ids), f"{len(ids)} tokens need {len(ids)} labels; you return {len(labels)}. Masked is not removed.")
        _need(labels != ids, "Every token is learned still: which value makes the loss skip a label?")
        _need(set(labels) != {-100}, "Every label is masked: a batch like this trains on nothing.")
        inverted = prompt == ids[:prompt_length] and set(rest) == {-100}
        _need(not inverted, "The mask is the wrong way round: the prompt is what is only read.")
        _need(set(prompt) == {-100}, "Some label in the prompt is not the one value that the loss skips. Look at the table in section 2.")
        _need(rest[-1] != -100, "The last token is masked: the model would not learn to stop.")
        _need(rest == ids[prompt_length:], "The answer's labels are its own ids, each in its own place; the loss function does the shift.")
    return _well_done("The prompt is only read, and the answer is learned up to its last token.")


def ex_04_2(answer: Any) -> str:
    """``answer(rows, batch, accumulation, epochs)`` gives the number of optimizer steps."""
    function = _function(answer, "Write a function of rows, batch, accumulation and epochs that returns a number of steps.")
    for rows, batch, accumulation, epochs in ((64, 8, 2, 1), (1000, 4, 8, 3), (862, 16, 1, 6), (7, 2, 2, 1), (10, 4, 2, 5)):
        hint = "The function returns the number of steps."
        found = _number(_call(function, rows, batch, accumulation, epochs, hint=hint), hint)
        batches = -(-rows // batch)
        right = -(-batches // accumulation) * epochs
        case = f"{rows} rows in batches of {batch} x {accumulation}, {epochs} epoch{'s' if epochs > 1 else ''}"
        _need(found == right or found != batches * epochs, f"{case}: {found:g} is the number of batches. How many of them make one step?")
        _need(found == right or found * epochs != right, f"{case}: {found:g} is right for one epoch.")
        _need(found == int(found), f"{case}: {found:g} is not a whole number, and there is no half step.")
        _need(found >= right, f"{case}: {found:g} is too few. A last batch, or a last group of batches, counts though it is not full.")
        _need(found <= right, f"{case}: {found:g} is too many. Accumulated batches share one step.")
    return _well_done("Rounded up twice within an epoch, then times the epochs: this is how the trainer counts.")


def ex_04_3(answer: Any) -> str:
    """The loss of a step of two batches, 10 tokens at 1.0 and 90 at 2.0, every token counting the same."""
    value = _number(answer, "It is a mean over 100 tokens.")
    _need(abs(value - 1.5) > 1e-6, "That is the mean of the two means: a token of the small batch weighs nine times as much there.")
    _need(abs(value - 3.0) > 1e-6, "That is the sum of the two means; a loss is a mean over tokens.")
    _need(abs(value - 190.0) > 1e-6, "That is the surprise of all tokens together. The loss is a mean.")
    _need(abs(value - 1.1) > 1e-6, "The weights are the wrong way round: which batch has more tokens?")
    _need(1 < value < 2, "A mean lies between the smallest and the largest of the values that it is taken over.")
    _need(abs(value - 1.9) < 1e-6, "Weigh each mean by the number of its tokens, then divide by all tokens.")
    return _well_done("Every token counts the same, whichever batch it came in.")


# ---- lesson 05 ------------------------------------------------------------------------------------------------------


def ex_05_1(answer: Any) -> str:
    """``trim(ids, ends)``: the ids before the first end id, whichever it is."""
    trim = _function(answer, "trim(ids, ends) takes a list of token ids and a list of end ids.")

    def ids(row: list[int], ends: list[int]) -> list[int]:
        kept = _try(trim, list(row), list(ends), hint="Return a list of ids.")
        found = _items(kept, "Return a list of ids, not a count or a place.")
        _need(all(isinstance(i, int | float) for i in found), "Return a list of ids, each of them one number.")
        return found

    _need(ids([7, 8, 9], [1, 4]) == [7, 8, 9], "A row without an end id was cut off by the limit: all of its ids belong to the answer.")
    kept = ids([7, 8, 4, 5, 5], [1, 4])
    _need(4 not in kept, "The end id itself is no part of the answer, and any of the ends may come: not only the first of the list.")
    _need(5 not in kept, "Dropping the end ids is not enough: what follows the first of them (pads, say) is no part of the answer either.")
    _need(kept == [7, 8], "Ids before the first end id must all stay, in their order.")
    _need(ids([7, 1, 8, 4, 9], [4, 1]) == [7], "With two kinds of end ids in a row, the one that comes first in the row ends the answer.")
    _need(ids([4, 5, 5], [1, 4]) == [], "A row may begin with an end id: then the answer is empty.")
    return _well_done("That is how a batch row is read: everything up to the first end id, and nothing after it.")


def ex_05_2(answer: Any) -> str:
    """The temperature at which logits 3 and 1 give probabilities of 10 to 1: 2 / ln 10."""
    value = _number(answer, "The ratio of two softmax probabilities depends on the difference of their logits and on the temperature.")
    _need(value > 0, "A temperature is above zero.")
    _need(abs(value - 1.0) > 1e-3, "At temperature 1 the ratio is e to the power of 2, about 7.4: a little sharper is asked for.")
    _need(abs(value - math.log(10) / 2) > 5e-3, "Nearly: this is what the logits would be multiplied by. Temperature divides.")
    _need(abs(value - 0.2) > 1e-3, "Probabilities are exponentials of the logits: divide by what undoes exp, not by 10 itself.")
    _need(abs(value - 2.0) > 1e-2, "Softmax uses powers of e, not powers of 10: take the natural logarithm (math.log, not math.log10).")
    ratio = math.exp(2.0 / value) if value > 0.01 else math.inf
    side = "lower" if ratio < 10 else "higher"
    _need(abs(ratio - 10) <= 0.1, f"At this temperature the first token is {ratio:,.3g} times as probable: a {side} temperature is needed.")
    return _well_done("One division, and the odds are where you want them.")


def ex_05_3(answer: Any) -> str:
    """``keep_min_p(probabilities, min_p)``: tokens with at least ``min_p`` times the largest probability."""
    keep = _function(answer, "keep_min_p(probabilities, min_p) takes a dictionary and a number.")

    def tokens(probabilities: dict[str, float], min_p: float) -> set[str]:
        kept = _try(keep, dict(probabilities), min_p, hint="Return the list of tokens kept.")
        names = _items(kept, "Return the tokens themselves, not how many there are.")
        mine = all(isinstance(name, str) and name in probabilities for name in names)
        _need(mine, "Return the tokens (the keys of the dictionary), not their probabilities.")
        return set(names)

    flat = {"a": 0.125, "b": 0.1, "c": 0.09, "d": 0.02}
    kept = tokens(flat, 0.5)
    _need(bool(kept), "min_p is no fixed bar: here no token reaches 0.5, and yet the most probable one must always stay.")
    _need(kept != {"d"}, "The other way round: keep what is above the bar.")
    _need(kept == {"a", "b", "c"}, "The bar is min_p times the largest probability: compare every token with that.")
    sharp = {"d": 0.02, "a": 0.9, "c": 0.03, "b": 0.05}
    _need(tokens(sharp, 0.1) == {"a"}, "The bar moves with the largest probability, wherever that stands: look for it first.")
    _need(tokens({"a": 0.5, "b": 0.25, "c": 0.125}, 0.5) == {"a", "b"}, "'At least' includes a token that is exactly on the bar.")
    return _well_done("Where the model is sure, min-p keeps little; where it is not, it keeps a choice.")


# ---- lesson 06 ------------------------------------------------------------------------------------------------------


def ex_06_1(answer: Any) -> str:
    """Which of the claims a to e the intervals of the exercise support: "a" (B beats A) and "e" (0.10 is not excluded for C)."""
    hint = 'Give the letters of all claims that hold, for example "bd" or {"b", "d"}.'
    letters = _letters(answer, "abcde", hint)
    _need(
        "b" not in letters,
        "b: the larger gain has the wider interval. Two gains are compared by the interval of their difference, not by size.",
    )
    _need("c" not in letters, "c: an interval that holds 0 does not prove that there is no difference. What else does it hold?")
    _need("d" not in letters, "d: whether two separate intervals overlap says little about answers to the same questions. What is missing?")
    _need("a" in letters, "One of the paired intervals lies on one side of 0 as a whole. Which claim does that support?")
    _need("e" in letters, "An interval also says what cannot be excluded: look at the upper end of C's.")
    return _well_done("Right: an interval that leaves out 0 supports a claim; one that holds 0 says what is still open, and no more.")


def ex_06_2(answer: Any) -> str:
    """``answer(a, b)``: (low, high), the 95 % bootstrap interval of the mean of b - a, drawn pair by pair."""
    function = _function(answer, "Write a function of a and b, two lists of scores of the same questions, that returns (low, high).")
    import numpy

    rng = numpy.random.default_rng(6)
    a, gains = rng.uniform(0.1, 0.9, 60), rng.normal(0.05, 0.1, 60)
    b = a + gains

    def ends(before: Any, after: Any) -> tuple[float, float]:
        found = _try(function, before.tolist(), after.tolist(), hint="It gets two lists of equal length and returns two numbers.")
        pair = _items(found, "Return two numbers, (low, high): the ends of the interval.")
        _need(len(pair) == 2, "Return two numbers, (low, high): the ends of the interval.")
        first, second = (_number(value, "Both ends are numbers.") for value in pair)
        return first, second

    def percentiles(values: Any, low: float = 2.5) -> tuple[float, float]:
        means = rng.choice(values, (10_000, len(values))).mean(axis=1)
        return float(numpy.percentile(means, low)), float(numpy.percentile(means, 100 - low))

    low, high = ends(a, b)
    right = percentiles(gains)
    width = right[1] - right[0]

    def near(other: tuple[float, float]) -> bool:  # up to the chance of some 2,000 draws
        return abs(low + high - sum(other)) < 0.16 * width and 0.92 < (high - low) / (other[1] - other[0]) < 1.09

    _need(low != high, "Both ends are the same: values drawn without replacement have the same mean every time.")
    _need(low < high, "The lower end comes first.")
    _need(not near((-right[1], -right[0])), "The sign is turned: above 0 should mean that b scores higher.")
    _need(
        not (near(percentiles(a)) or near(percentiles(b))),
        "That is the interval of one mean. The question is the difference, pair by pair.",
    )
    _need(high - low < 5 * width, "That is how far single differences spread. How far does their mean move when questions are drawn again?")
    _need(high - low < 1.7 * width, "Too wide: draw questions, and take both scores of each one that was drawn, not two separate draws.")
    _need(not near(percentiles(gains, 5.0)), "That is a 90 % interval: 2.5 % are to be left out at each end.")
    _need(
        near(right), f"The mean gain is {gains.mean():.3f}, and ({low:.3f}, {high:.3f}) is not its interval. Which percentiles do you take?"
    )
    return _well_done("Right: draw questions, not answers; the pairs stay together and what they share drops out.")


def ex_06_3(answer: Any) -> str:
    """``answer(text, references, own, score)``: whether a text is nearer to its own reference than to any other."""
    function = _function(answer, "Write a function of text, references, own and score that returns True or False.")

    def score(one: str, other: str) -> float:
        first, second = set(one.split()), set(other.split())
        return len(first & second) / len(first | second)

    def told(text: str, references: list[str], own: int) -> bool:
        found = _plain(_try(function, text, list(references), own, score, hint="score(text, reference) gives the likeness of two texts."))
        _need(isinstance(found, int), "Return True or False, not a likeness: is its own reference the nearest?")
        return bool(found)

    gout, mumps, croup = "sudden pain in the toe", "swollen cheeks and fever", "a barking cough at night"
    references = [mumps, gout, croup]
    _need(told("pain in the big toe", references, 1), "An answer about its own disease, though in other words, must pass.")
    _need(told(gout, references, 1), "Its own reference, word for word, must pass: do not count it among the others.")
    _need(not told("a cough at night", references, 1), "An answer about another disease passed: compare with the other references.")
    _need(
        not told("swollen cheeks", references, 2),
        "An answer that belongs to the first reference, not to its own, passed. What does own say?",
    )
    _need(
        not told("a barking cough at dawn and sudden pain in the toe", references, 2),
        "Nearer than the mean of the others is not enough: one of them is nearer.",
    )
    _need(not told("quite unlike all of these", references, 0), "An answer that is like none of them is no hit: a tie is not nearer.")
    return _well_done("Right: a score says how near; only the other references say whether that is nearer than style alone would bring it.")


# ---- lesson 07 ------------------------------------------------------------------------------------------------------


def ex_07_1(answer: Any) -> str:
    """``answer(sentence, passage, weight)``: the share of the sentence's different words, by weight, that the passage holds."""
    function = _function(answer, "Write a function of sentence, passage and weight that returns a share.")
    weights = {"gout": 3.5, "needs": 0.5, "is": 0.0, "rest": 2.0, "and": 0.5, "ice": 5.0}

    def supported(sentence: str, passage: str) -> float:
        found = _try(function, sentence, passage, lambda word: weights.get(word, 1.0), hint="weight(word) gives the weight of one word.")
        return _number(found, "The function returns the share as a number.")

    def near(found: float, other: float) -> bool:
        return abs(found - other) < 1e-6

    sentence, passage = "gout needs rest and rest", "gout needs ice and ice and ice"
    found = supported(sentence, passage)
    _need(not near(found, 3 / 4), "Every word counts alike there. A rare word weighs more: weight(word).")
    _need(not near(found, 4.5), "That is the weight that was found. Divide it by the weight that was looked for.")
    _need(not near(found, 4.5 / 8.5), 'A word that the sentence repeats ("rest") counts once.')
    _need(not near(found, 4.5 / 9.5) and not near(found, 4.5 / 20), "Divide by the weight of the sentence's words, not the passage's.")
    _need(not near(found, 4.5 / 11.5), "Divide by the sentence's words alone: what else the passage says takes nothing away.")
    _need(not near(found, 2 / 6.5), "That is the share that is missing.")
    _need(
        near(found, 4.5 / 6.5),
        f"For {sentence!r} and {passage!r} your function says {found:.3g}. Which words do both hold, and what do they weigh?",
    )
    _need(near(supported("rest", "resting and arrest"), 0), 'Whole words: "rest" does not stand in "arrest".')
    _need(near(supported("gout", "gout and more"), 1), "A sentence whose words all stand in the passage has support 1.")
    empty = "A sentence that weighs nothing has support 0."
    _need(near(supported("is", "is"), 0) and near(supported("", "gout"), 0), empty)
    return _well_done("Right: this is the score under every cited sentence, and it sees neither order nor a not.")


def ex_07_2(answer: Any) -> str:
    """``answer(words, worth)``: word -> Shapley value, over all orders; ``worth`` takes a frozenset."""
    from itertools import combinations, permutations

    function = _function(answer, "Write a function of words and worth that returns a dictionary.")

    def worth(kept: frozenset[str]) -> float:  # a base, the word "a" by itself, "b" and "c" only together, a clash of all three
        together = 4.0 if {"b", "c"} <= kept else 0.0
        return -7.0 + 2.0 * ("a" in kept) + together - 1.5 * (len(kept) == len(words)) + 3.0 * ("b" in kept) * ("d" in kept)

    words = ("a", "b", "c", "d")
    found = _try(function, words, lambda kept: worth(frozenset(kept)), hint="worth(frozenset(...)) gives log p with these words only.")
    _need(isinstance(found, dict), f"Return a dictionary, word -> value, not {type(found).__name__}.")
    _need(set(found) == set(words), "Every word needs a value, and nothing else.")
    values = [_number(found[word], "Each value is a number.") for word in words]

    def same(other: Callable[[str], float]) -> bool:
        return all(abs(value - other(word)) < 1e-6 for value, word in zip(values, words, strict=True))

    def joined(word: str) -> list[float]:
        before = [frozenset(order[: order.index(word)]) for order in permutations(words)]
        return [worth(some | {word}) - worth(some) for some in before]

    def unordered(word: str) -> float:
        rest = [w for w in words if w != word]
        some = [frozenset(c) for size in range(len(words)) for c in combinations(rest, size)]
        return sum(worth(s | {word}) - worth(s) for s in some) / len(some)

    everything = frozenset(words)
    _need(not same(lambda w: worth(everything) - worth(everything - {w})), "That is leave-one-out: each word as the last to come in.")
    _need(not same(lambda w: worth(frozenset(w)) - worth(frozenset())), "That is each word alone: as the first to come in.")
    _need(not same(lambda w: worth(frozenset(w))), "That is log p with the word alone. What did the word add to it?")
    _need(not same(lambda w: sum(joined(w))), "That is the sum over all orders. Take the mean.")
    _need(not same(lambda w: -sum(joined(w)) / 24), "The sign is turned: a word that raises log p has a value above 0.")
    _need(
        not same(unordered),
        "Every set of words counts alike there. Over orders, small and large sets come up more often than middling ones.",
    )
    _need(not same(lambda w: joined(w)[0]), "That is one order only. Every order counts.")
    total = worth(everything) - worth(frozenset())
    _need(
        abs(sum(values) - total) < 1e-6, f"The values must add up to worth(all) - worth(none), {total:g}; yours add up to {sum(values):g}."
    )
    _need(same(lambda w: sum(joined(w)) / 24), "They add up, but are not shared out by orders. What does a word add when it comes in?")
    return _well_done("Right: the shares add up, and two words that do the same get the same.")


def ex_07_3(answer: Any) -> str:
    """``answer(words, values, log_p, k)``: the fall of ``log_p`` when the ``k`` words of the largest values are deleted."""
    function = _function(answer, "Write a function of words, values, log_p and k that returns nats.")
    words, values = ["is", "gout", "croup or", "is", "mumps"], [0.5, 3.0, -4.0, 2.0, 1.0]

    def log_p(kept: Any) -> float:
        kept = _plain(kept)
        _need(isinstance(kept, list), "log_p takes a list of words.")
        return -20.0 + sum(2.0**place * len(word) for place, word in enumerate(kept))  # the order of the words matters

    def fall(k: int) -> float:
        found = _try(function, list(words), list(values), log_p, k, hint="log_p(list_of_words) gives log p of the fixed answer.")
        return _number(found, "The function returns the fall as a number.")

    def without(gone: set[int]) -> float:
        return log_p(words) - log_p([word for n, word in enumerate(words) if n not in gone])

    found, right = fall(2), without({1, 3})
    _need(abs(found + right) > 1e-6, "The sign is turned: before minus after.")
    _need(abs(found - log_p([words[n] for n in (0, 2, 4)])) > 1e-6, "That is log p without the words. How far did it fall?")
    _need(abs(found - without({0, 2, 4})) > 1e-6, "That keeps the first k words: it is sufficiency. Delete them.")
    _need(abs(found - without({0, 2})) > 1e-6, "Those are the smallest values. The largest come first.")
    _need(abs(found - without({1, 2})) > 1e-6, "A large value below 0 speaks against the answer: it is not the first to go.")
    _need(abs(found - without({0, 1, 3})) > 1e-6, '"is" stands there twice: delete the one with the large value, by its place.')
    _need(abs(found - without({0, 1})) > 1e-6, '"is" stands there twice, and the wrong one went: delete by place.')
    _need(abs(found - log_p(words) + log_p([words[n] for n in (4, 0, 2)])) > 1e-6, "The words that stay must keep their order.")
    _need(abs(found - right) < 1e-6, f"Your function says {found:g} for two words. Compare log_p(words) with log_p of those that stay.")
    _need(abs(fall(0)) < 1e-6, "With no word deleted, nothing falls.")
    _need(abs(fall(5) - without(set(range(5)))) < 1e-6, "With all words deleted, an empty list goes to log_p.")
    return _well_done("Right: deleted, not zeroed, and the answer itself says whether the words mattered.")


# ---- lesson 08 ------------------------------------------------------------------------------------------------------


def ex_08_1(answer: Any) -> str:
    """Which of the names a to f may go out: "b", "c" and "e"; a model tuned from a derived model is derived as well."""
    hint = 'Give the letters of all that may go out, for example "ad" or {"a", "d"}.'
    letters = _letters(answer, "abcdef", hint)
    _need("a" not in letters, "a: the licence says where in the name the words have to stand. Where do they stand here?")
    _need("d" not in letters, "d: look at every character. What may a name on the Hub be made of?")
    _need("f" not in letters, "f: what is a model derived from, if its base is itself derived from something?")
    _need("b" in letters, "One of the names made from Llama 3 keeps every rule. Capital letters do not matter.")
    _need("c" in letters, "Not every base is a Llama 3. What does SmolLM2's licence ask of a name?")
    _need("e" in letters, "A model that is tuned from a derived model may go out too, if it keeps the same rules.")
    return _well_done("Right: the name says what a model is derived from, however many steps ago.")


def ex_08_2(answer: Any) -> str:
    """``answer(text, metrics)``: the numbers in a text, as written, that no metric of a nested dict gives when rounded alike."""
    function = _function(answer, "Write a function of text and metrics that returns a list of numbers as they are written.")

    def told(text: str, metrics: dict[str, Any]) -> list[str]:
        hint = "It gets a text and a dict, and returns a list; an empty one if all is proven."
        found = _plain(_try(function, text, copy.deepcopy(metrics), hint=hint))
        _need(isinstance(found, list), f"Return a list of texts, not {type(found).__name__}.")
        return [str(number) for number in found]

    metrics = {"rouge": 0.6123, "rows": 1042, "seconds": 98.0, "safety": {"overall": {"passed": 7, "share": 0.0833}}}
    found = told("ROUGE-L 0.99 after training.", metrics)
    _need(found != [], "0.99 is in no metric, and your function lets it through.")
    _need(found == ["0.99"], f"Of 'ROUGE-L 0.99 after training.' the answer is ['0.99'], not {found}.")
    _need(told("ROUGE-L 0.6123", metrics) == [], "A number that stands in the metrics digit for digit is proven.")
    _need(
        told("ROUGE-L 0.61, or 0.612", metrics) == [], "0.61 is 0.6123 rounded to two decimals: round the metric as far as the text does."
    )
    _need(told("7 prompts passed", metrics) == [], "Metrics lie inside metrics: look into every dict, however deep.")
    _need(told("a share of 0.08", metrics) == [], "Two dicts deep there is 0.0833, which rounds to 0.08.")
    _need(told("1,042 rows", metrics) == [], "1,042 is one number: the comma only parts the thousands.")
    _need(told("98 seconds", metrics) == [], "98 and 98.0 are the same number, written with no decimals.")
    _need(told("ROUGE-L 0.62", metrics) == ["0.62"], "0.62 is near 0.6123, but it is not that number rounded: nearness is no proof.")
    _need(told("0.5 of 3 in 0.61", metrics) == ["0.5", "3"], "Give every number without proof, in the order of the text, and no other.")
    _need(told("no numbers here", metrics) == [], "A text without numbers has nothing to prove.")
    return _well_done("Right. That is all there is to an honest card: a number is there because a file says so.")


def ex_08_3(answer: Any) -> str:
    """``answer(pieces)``: (text, whole) of a streamed answer; whole only if the model itself ended it."""
    function = _function(answer, "Write a function of a list of dicts that returns (text, whole).")

    def told(*pieces: tuple[str | None, str | None]) -> tuple[str, bool]:
        dicts = [{"content": content, "finish_reason": reason} for content, reason in pieces]
        found = _try(function, dicts, hint="It gets a list of dicts; content and finish_reason may each be None.")
        found = _plain(found)
        _need(isinstance(found, list) and len(found) == 2, "Return two things: the text, and whether it is whole.")
        text, whole = found
        _need(isinstance(text, str), f"The first is the text of the answer, not {type(text).__name__}: put the pieces together.")
        _need(isinstance(whole, bool), "The second is True or False.")
        return text, whole

    text, whole = told((None, None), ("Gout", None), (" hurts", None), (".", None), (None, "stop"))
    _need(
        text == "Gout hurts.", f"The pieces make 'Gout hurts.', your function makes {text!r}. Put nothing between them, and leave none out."
    )
    _need(whole, "The stream ended with the reason 'stop': the model itself ended this answer.")
    _need(not told(("Gout", None), (" hurts", None))[1], "A stream without any finish_reason broke off: that answer is not whole.")
    _need(not told(("Gout", None), (None, "length"))[1], "'length' is a finish_reason as well. Who ended the answer there?")
    text, whole = told(("Gout hurts", None), (".", "stop"))
    _need(text == "Gout hurts." and whole, "The last piece may bring text and reason together: lose neither.")
    _need(told() == ("", False), "Of a stream that brought nothing the text is empty, and not whole.")
    return _well_done("Right: an answer that was cut looks like a short one; only the reason tells them apart.")


# ---- lesson 09 ------------------------------------------------------------------------------------------------------


def ex_09_1(answer: Any) -> str:
    """General rows beside 120 own ones, so that a quarter of all is general: 40."""
    value = _number(answer, "How many general rows, as a whole number?")
    _need(abs(value - 30) > 0.5, "That is a quarter of the own rows. The quarter is to be one of all rows, own and general together.")
    _need(abs(value - 160) > 0.5, "That is how many rows there are in all. How many of them are general?")
    _need(abs(value - 360) > 0.5, "The other way round: that would make a quarter of all rows own ones.")
    _need(
        abs(value - 90) > 0.5,
        "That is three quarters of the own rows. Which share of the whole do the own rows have, and so how large is the whole?",
    )
    _need(value > 0, "Some general rows are needed.")
    side = "more" if value < 40 else "fewer"
    _need(abs(value - 40) < 1e-6, f"Then {value / (120 + value):.1%} of all rows would be general: {side} are needed.")
    return _well_done("The own rows are the other three quarters; a share of the whole is not a share of them.")


def ex_09_2(answer: Any) -> str:
    """``mix(own, general, share, seed)``: all own rows, as many different general ones as make up ``share``, shuffled by seed."""
    function = _function(answer, "mix(own, general, share, seed) takes two lists and two numbers and returns a list.")
    own, general = [f"own {n}" for n in range(30)], [f"general {n}" for n in range(200)]

    def mix(share: float, seed: int) -> list[Any]:
        first, second = list(own), list(general)
        found = _plain(_try(function, first, second, share, seed, hint="It returns a list of rows."))
        _need(isinstance(found, list), "Return a list of rows.")
        _need(all(isinstance(row, str) for row in found), "Return the rows themselves, as they came in.")
        _need(first == own and second == general, "A list that went in was changed: shuffle or extend a copy.")
        return list(found)

    half = mix(0.5, 0)
    _need(set(half) <= {*own, *general}, "Return the rows themselves, as they came in.")
    mine, others = [row for row in half if row in own], [row for row in half if row not in own]
    _need(set(mine) == set(own), "All own rows must be in the result.")
    _need(len(mine) == len(own), "Each own row must be in the result once.")
    _need(len(others) == len(set(others)), "Some general rows are in it twice: draw without replacement.")
    _need(len(others) != 100, "Half of the general rows is not half of the result.")
    _need(len(others) == 30, f"At a share of 0.5 with 30 own rows there must be 30 general ones, not {len(others)}.")
    few = len(mix(0.2, 0)) - len(own)
    _need(few != 6, "At a share of 0.2 you drew a fifth of the own rows' number. The share is one of the whole.")
    _need(abs(few - 7.5) < 0.6, f"At a share of 0.2 with 30 own rows there must be 7 or 8 general ones, not {few}.")
    _need(set(mix(0.0, 0)) == set(own), "At a share of 0 the result holds the own rows alone.")
    _need(mix(0.5, 0) == half, "The same seed must give the same list: make a generator of the seed in each call.")
    _need(set(mix(0.5, 1)) != set(half), "Another seed must draw other general rows.")
    _need(set(others) != set(general[:30]), "The first general rows are no random draw: what stands first may be alike.")
    _need(
        half not in (own + others, others + own),
        "The rows are not shuffled: one kind comes after the other, and a step would see one kind only.",
    )
    return _well_done("All of the field, a fair draw of the rest, and shuffled, so that every step sees both.")


def ex_09_3(answer: Any) -> str:
    """``shippable(adapters, margin)``: names whose lower end inside is above 0 and whose lower end outside is at least -margin."""
    function = _function(answer, "shippable(adapters, margin) takes a dictionary and a number and returns a list of names.")
    adapters = {
        "sure": ((0.02, 0.10), (-0.03, 0.01)),
        "hopes": ((-0.01, 0.30), (-0.01, 0.02)),
        "unsure": ((0.05, 0.20), (-0.15, 0.12)),
        "wrecks": ((0.10, 0.30), (-0.40, -0.20)),
        "better": ((0.01, 0.05), (0.01, 0.04)),
    }

    def names(margin: float) -> set[str]:
        found = _try(function, dict(adapters), margin, hint="It returns a list of names.")
        listed = _items(found, "Return the names of the adapters that pass, in a list.")
        mine = all(isinstance(name, str) and name in adapters for name in listed)
        _need(mine, "Return the names of the adapters that pass, in a list.")
        return set(listed)

    passed = names(0.05)
    _need("wrecks" not in passed, "One that surely loses 0.20 outside passed: look at its second interval.")
    _need(
        "hopes" not in passed,
        "One passed whose interval inside holds 0: its mean is high, but a gain is not sure. Which end must be above 0?",
    )
    _need(
        "unsure" not in passed,
        "One passed whose interval outside reaches down to -0.15: that it holds 0 does not prove that little was lost.",
    )
    _need("sure" in passed, "One that surely gains, and surely loses no more than 0.03 outside, did not pass although the margin is 0.05.")
    _need("better" in passed, "One that gains on both sides did not pass.")
    _need(names(0.01) == {"better"}, "With a margin of 0.01, a possible loss of 0.03 is too much: does your rule use the margin?")
    _need(names(0.5) == {"sure", "unsure", "wrecks", "better"}, "With a margin of 0.5 every loss here is allowed; only the gain decides.")
    return _well_done("A claim that little was lost is carried by the worst end of the interval, not by its holding 0.")
