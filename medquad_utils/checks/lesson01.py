"""Lesson 01: tokens lost to a limit, the leak of a split, a rule for footnote marks."""

from medquad_utils.checks.common import NUMBER, TEXT, Exercise, number


def _rows(names: str) -> list[dict[str, str]]:
    return [{"question": "What is it ?", "answer": "", "focus": name} for name in names.split()]


_SPLIT = (_rows("gout mumps mumps croup croup croup"), _rows("gout gout gout measles measles"))

ex_01_1 = number(1200 / 1670, 5e-3, "It is a share, 0 to 1. "
    "Count the tokens of the rows that go, and divide by the tokens of all six rows.", [
    (2 / 6, "That is the share of rows. Long rows hold more tokens than short ones."),
    (470 / 1670, "That is the share that stays. How much is lost?"),
    (688 / 1670, "That is what cutting loses: the ends. Here the whole of a too-long row goes."),
    (0.71, "Nearly: give two digits after the point, rounded.", lambda share: 0.7 < share < 0.74),
    (900 / 1670, "Count the tokens of every row longer than 256. Divide by those of all six."),
], "Right: two rows of six, and most of the tokens. Count both before you choose.")  # fmt: skip

ex_01_2 = Exercise(NUMBER, "It gets two lists of rows; look at one row with splits.focus_of.", [
    (_SPLIT, 3 / 5, [
        (1 / 6, "That is a share of the training rows. The question is about the test rows."),
        (1 / 2, "That is a share of diseases. Three test rows about one disease are three rows."),
        (2 / 5, "That is the share that does not leak."),
        (3, "Count the test rows whose disease is in training, and divide by all test rows."),
    ]),
    ((_rows("Gout"), _rows("gout GOUT")), 1, [(0, '"Gout" is "gout": see splits.focus_of(row).')]),
    ((_rows("gout"), _rows("mumps")), 0, [(1, "If no disease is shared, the leak is 0.")]),
], "Right: count test rows, compare normalised names, divide by all test rows.")  # fmt: skip

ex_01_3 = Exercise(TEXT, "It gets one text and returns a text.", [
    (("Drink  2 l.",), "Drink  2 l.", [("Drink 2 l.", "A text without any mark was changed.")]),
    (("D [see 2], 25[OH]D",), "D [see 2], 25[OH]D", [("D, 25D", "A mark holds digits alone.")]),
    (("Gout is common.[9184] It hurts.",), "Gout is common. It hurts.", [
        ("Gout is common.[9184] It hurts.", "A mark is still there.", lambda text: "9184" in text),
        ("Gout is common.[] It hurts.", "The brackets stayed.", lambda text: "[" in text),
        ("Gout is common.It hurts.", "Cut the mark and the space before it, and nothing else."),
    ]),
    (("It may help. [1] [2]",), "It may help.", [
        ("It may help. [2]", "Two marks stood side by side; one stayed.", lambda text: "[" in text),
        ("It may help.  ", "A space before a mark was left behind."),
    ]),
], "Right: narrow enough to touch nothing else. Count what it changes, and read some.")  # fmt: skip
