"""Lesson 01: tokens lost to a limit, a chain of links, a rule for footnote marks."""

from medquad_utils.checks.common import NUMBER, TEXT, Exercise, number

ex_01_1 = number(1200 / 1670, 5e-3, "It is a share, 0 to 1. "
    "Count the tokens of the rows that go, and divide by the tokens of all six rows.", [
    (2 / 6, "That is the share of rows. Long rows hold more tokens than short ones."),
    (470 / 1670, "That is the share that stays. How much is lost?"),
    (688 / 1670, "That is what cutting loses: the ends. Here the whole of a too-long row goes."),
    (0.71, "Nearly: give two digits after the point, rounded.", lambda share: 0.7 < share < 0.74),
    (900 / 1670, "Count the tokens of every row longer than 256. Divide by those of all six."),
], "Right: two rows of six, and most of the tokens. Count both before you choose.")  # fmt: skip

ex_01_2 = Exercise(NUMBER, "It gets one list of names for each row.", [
    (([["gout"], ["gout"], ["asthma"]],), 2, [
        (1, "Asthma shares no name with the other rows: it is a group of its own."),
        (3, "That is the number of rows. Rows that share a name are one group."),
    ]),
    (([["gout", "page 1"], ["page 1", "podagra"], ["podagra"], ["asthma"]],), 2, [
        (5, "That is the number of names. A row joins all its names."),
        (3, "Joining is a chain: the first row and the third are linked by the second."),
    ]),
    (([["gout"], ["podagra"], ["asthma"], ["gout", "podagra"]],), 2, [
        (3, "The last row joins two groups that were opened before: merge them."),
    ]),
    (([["gout"], ["podagra"], ["urate"], ["asthma"], ["gout", "podagra", "urate"]],), 2, [
        (3, "The last row joins three groups that were opened before: merge all of them."),
    ]),
    (([],), 0, [(1, "Without rows there is no group.")]),
], "Right: a new row merges every group that it touches.")  # fmt: skip

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
