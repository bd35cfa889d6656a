"""The rules of cleaning: what each changes, what it must leave alone, and what it costs."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medquad_utils.cleaning import DUPLICATE, NAMES, RULES, Effect, Row, clean, damage, is_boilerplate, tidy_space
from medquad_utils.profiles import CourseError

REPO = Path(__file__).parent.parent


def row(answer: str, question: str = "What causes Gout ?", **known: Any) -> Row:
    return {"qtype": "causes", "question": question, "answer": answer, "source": None, "document_id": None, **known}


# ---- each rule ------------------------------------------------------------------------------------------------------

TABLE = (
    "The Human Phenotype Ontology provides the following list of signs for Gout. If the word is there, look it up.\n"
    "Signs - Frequency\nSwollen toe 90%\nFever 7.5%\nFrequencies are shown as a share; the sign or symptom may be rare or common."
)
PROSE = "Gout hurts. A toe swells at night."
LONG_LIST = "The causes are " + ", ".join(f"cause number {n}" for n in range(20)) + ", for the rest click here."

# By rule: an answer, and what the rule alone makes of it ("" means that the row is dropped).
CHANGED: dict[str, list[tuple[str, str]]] = {
    "link list": [
        ("These resources address the diagnosis or management of gout: - One - Two", ""),
        ("these resources from MedlinePlus offer facts about gout: - One", ""),
        ("The resources listed in this section can tell you more.", ""),
    ],
    "phenotype list": [
        (TABLE, ""),
        (f"What are the signs and symptoms of Gout? {TABLE}", ""),
        (f"What are the signs and symptoms of Young syndrome? {TABLE}", ""),
        (TABLE[: TABLE.index("Frequencies")], ""),
    ],
    "phenotype tail": [(f"{PROSE} {TABLE}", PROSE), (f"{PROSE}\n{TABLE}\nSee a doctor.", f"{PROSE}\n\nSee a doctor.")],
    "navigation": [
        (f"Espaol\n   \n  {PROSE}", PROSE),
        (f"Summary : {PROSE}", PROSE),
        (f"Summary: {PROSE}", PROSE),
        (f"On this Page General What is gout? Who has it? {PROSE}", PROSE),
        ("Reasons include\n- Age\n- Food\n On this page, you'll find links to all of them.", "Reasons include\n- Age\n- Food"),
        ("On this page you will find nothing but links.", ""),
        ("Gout hurts. Top of page A toe swells.", "Gout hurts.  A toe swells."),
        (f"{PROSE}\n   More on: Painful Toes\nRest it.", f"{PROSE}\n\nRest it."),
        (f"{PROSE} (Watch the video about toes (1 minute). To enlarge it, press the button.)", PROSE),
        ("Gout hurts. To see a picture of it, please click here. A toe swells.", "Gout hurts. A toe swells."),
        ("It hurts.Click here: http://toes.example.org/a.html. A toe of type 2.5 swells.", "It hurts. A toe of type 2.5 swells."),
        ("Levels of 2.5 or more are high, click here. A toe swells.", "A toe swells."),
        ("Click here for a list of doctors.", ""),
        ("Topics", ""),
        ("Frequently Asked Queestions (FAQs)", ""),
    ],
    "Key Points": [(f"Key Points\n - Gout hurts. - Toes swell.\n   \n \n {PROSE}", PROSE)],
    "heading alone": [("What causes gout?", ""), ("How might gout be treated? ", ""), ("What is gout? Is it inherited?", "")],
    "heading repeated": [
        (f"What causes gout? {PROSE}", PROSE),
        (f"How might gout be treated?\n\n{PROSE}", PROSE),
        (f"What is gout? Is gout inherited?  {PROSE}", PROSE),
        (f"What is type 2.5 gout? {PROSE}", PROSE),
    ],
    "institute tail": [(f"{PROSE} NIH: National Eye Institute", PROSE), (f"{PROSE}\n\nNIH: National Institute on Aging", PROSE)],
    "white space": [("  One \t two\r\n \n\n  three\u00a0four five \n", "One two\nthree four five")],
    "under five words": [("Only four words here.", ""), ("Gout", "")],
}

# By rule: answers that look alike and stay as they are.
LEFT_ALONE: dict[str, list[str]] = {
    "link list": ["What these resources address is for you to find out.", f"{PROSE} These resources address the rest of it."],
    "phenotype list": [
        f"{PROSE} {TABLE}",
        f"What are the signs of Gout? {PROSE} {TABLE}",
        f"{TABLE} {PROSE}",
        "The Human Phenotype Ontology provides words for signs, so that doctors mean the same by them.",
    ],
    "phenotype tail": [TABLE, f"What are the signs of Gout? {TABLE}", "An ontology of phenotypes provides the following list of words."],
    "navigation": [
        "Espaola is a place in New Mexico.",
        "In summary : gout hurts.",
        "Summary of the trial: it failed.",
        "On this Page nothing is asked.",
        "Write your name on this page, you may need it.",
        "The top of page three shows a toe.",
        "There is More on: this line than one may think.",
        "(Watch the video of which nobody closed the bracket",
        LONG_LIST,
        "Topics in the care of toes are many.",
    ],
    "Key Points": [
        f"Key Points\n - Gout hurts.\n - Toes swell. {PROSE}",
        f"Key Points matter.\n\n{PROSE}",
        f"{PROSE}\nKey Points\n - Gout hurts.\n\n Rest.",
    ],
    "heading alone": [f"What causes gout? {PROSE}", "Gout is what?", "Have you ever felt a pain in your toe?", "What causes gout"],
    "heading repeated": [
        "What causes gout?",
        "Do you wake at night? Does your toe hurt? It may be gout.",
        "Can be had at any age. Who would not be afraid? Rest it.",
        f"{PROSE} What causes gout? Crystals do.",
        "Whatever causes gout? Crystals do.",
        f"What {'very ' * 60}long heading is this? Crystals do.",
    ],
    "institute tail": ["NIH: National Eye Institute says that gout hurts.", f"The NIH: {PROSE}", f"NIH: National Eye Institute\n{PROSE}"],
    "white space": [f"{PROSE}\nRest it."],
    "under five words": ["There are five words here."],
}


def only(name: str) -> list[str]:
    """The names of all rules but one."""
    return [other for other in NAMES if other != name]


def test_every_rule_has_its_toy_rows() -> None:
    assert list(NAMES) == [*CHANGED, DUPLICATE] == [*LEFT_ALONE, DUPLICATE]
    assert all(rule.what for rule in RULES)


@pytest.mark.parametrize(("name", "before", "after"), [(n, *pair) for n, pairs in CHANGED.items() for pair in pairs])
def test_a_rule_changes_what_its_name_says_and_counts_it(name: str, before: str, after: str) -> None:
    kept, effects = clean([row(before)], without=only(name))
    assert [r["answer"] for r in kept] == ([after] if after else [])
    assert effects == {name: Effect(int(bool(after)), int(not after), [(before, after)])}
    assert clean(kept, without=only(name))[0] == kept


@pytest.mark.parametrize(("name", "answer"), [(name, answer) for name, answers in LEFT_ALONE.items() for answer in answers])
def test_a_rule_leaves_a_near_miss_alone(name: str, answer: str) -> None:
    assert clean([row(answer)], without=only(name)) == ([row(answer)], {name: Effect()})


@pytest.mark.parametrize("name", CHANGED)
def test_a_rule_that_is_off_changes_and_counts_nothing(name: str) -> None:
    """Whatever the rule alone would drop, no other rule drops on its behalf."""
    answers = [before for before, after in CHANGED[name] if not after]
    kept, effects = clean([row(answer, f"What is {n} ?") for n, answer in enumerate(answers)], without=[name, "under five words"])
    assert name not in effects
    assert len(kept) == len(answers)


def test_an_exact_duplicate_is_a_pair_of_the_same_question_and_answer() -> None:
    rows = [
        row(PROSE, source="first"),
        row(PROSE, source="second"),
        row(PROSE, "What is gout ?"),
        row(PROSE + "!"),
        row(PROSE.replace(" ", "  "), "What  causes\nGout ?", source="third"),
    ]
    kept, effects = clean(rows)
    assert [(r["source"], r["question"]) for r in kept] == [
        ("first", "What causes Gout ?"),
        (None, "What is gout ?"),
        (None, rows[3]["question"]),
    ]
    assert effects[DUPLICATE] == Effect(0, 2, [(PROSE, ""), (PROSE, "")])
    assert clean(rows, without=["white space"])[0] == [rows[0], *rows[2:]]
    assert len(clean(rows, without=[DUPLICATE])[0]) == 5


def test_the_white_space_of_a_question_is_tidied_into_one_line() -> None:
    (kept,) = clean([row(PROSE, "  What   causes\n\n Gout ?")])[0]
    assert kept["question"] == "What causes Gout ?"
    (left,) = clean([row(PROSE, "What   causes\nGout ?")], without=["white space"])[0]
    assert left["question"] == "What   causes\nGout ?"


def test_rules_work_one_after_the_other() -> None:
    prose = PROSE.replace(" A", "   A")
    answer = f"Summary : What causes gout?  {prose}   (Watch the video about toes.) {TABLE}\n\n NIH: National Institute on Aging"
    kept, effects = clean([row(answer)])
    assert [r["answer"] for r in kept] == [PROSE]
    changed = {"phenotype tail", "navigation", "heading repeated", "institute tail", "white space"}
    assert {name for name, effect in effects.items() if effect.changed} == changed
    assert all(effect.dropped == 0 for effect in effects.values())


def test_at_most_three_examples_are_kept_and_every_row_is_counted() -> None:
    rows = [row(f"What causes gout? {PROSE} {n}", f"What is {n} ?") for n in range(7)] + [row("Too short.")] * 5
    effects = clean(rows)[1]
    assert effects["heading repeated"] == Effect(7, 0, [(r["answer"], f"{PROSE} {n}") for n, r in enumerate(rows[:3])])
    assert effects["under five words"] == Effect(0, 5, [("Too short.", "")] * 3)


def test_a_rule_that_there_is_not_is_named_with_those_there_are() -> None:
    with pytest.raises(CourseError, match=r"no cleaning rule 'Navigation', 'spelling': there are link list, .*, exact duplicate\.$"):
        clean([], without=["spelling", "navigation", "Navigation"])


def test_no_rows_and_all_rules_off_change_nothing() -> None:
    assert clean([]) == ([], {name: Effect() for name in NAMES})
    rows = [row(before) for pairs in CHANGED.values() for before, _ in pairs]
    assert clean(rows, without=NAMES) == (rows, {})


# ---- rows as MedQuAD builds them ------------------------------------------------------------------------------------

names = st.sampled_from(["gout", "asthma", "Young syndrome", "type 2.5 gout"])
headings = st.lists(
    st.sampled_from(["What causes {}?", "How might {} be treated?", "Is {} inherited?"]).flatmap(lambda h: names.map(h.format)), max_size=2
)
sentences = st.sampled_from(
    [
        "Gout hurts.",
        "A toe swells at night.",
        "Do you wake up?",
        "Rest it",
        "- one - two",
        "Only four words here.",
        "2.5 g/L or more.",
        "NIH: it studies gout.",
    ]
)
extras = st.sampled_from(
    [
        TABLE, TABLE[:90], "Top of page", "Click here.", "To see it, click here and wait.", LONG_LIST, "(Watch the video (1 minute) now.)",
        "\nMore on: Toes\n", "On this page, you'll find links.", "the following list", "(", ")",
    ]
)  # fmt: skip
spaces = st.sampled_from([" ", "  ", "\n", "\n \n", "\t", "\u00a0", "\r\n"])


@st.composite
def articles(draw: st.DrawFn) -> str:
    """An answer as MedQuAD builds them: words of the page, headings, prose among tables and links, the institute."""
    front = draw(
        st.sampled_from(["", "", "Espaol\n", "Summary : ", "Espaol\n\nSummary: ", "On this Page What is it? ", "Key Points\n - One.\n\n"])
    )
    parts = [
        *draw(headings),
        *draw(st.lists(sentences | extras, max_size=6)),
        draw(st.sampled_from(["", "", "NIH: National Eye Institute"])),
    ]
    return front + draw(spaces).join(part for part in parts if part)


whole = st.sampled_from(["Topics", "What causes gout?", "These resources address gout.", "Gout", TABLE]) | articles()
questions = st.sampled_from(["What causes Gout ?", "What  causes\nGout ?", "What is gout ?"])
made_up = st.lists(st.builds(row, whole.filter(str.strip), questions), max_size=12)
switches = st.lists(st.sampled_from(NAMES), max_size=3)


@given(made_up, switches)
def test_kept_and_dropped_add_up_and_no_row_is_changed_in_place(rows: list[Row], off: list[str]) -> None:
    before = copy.deepcopy(rows)
    kept, effects = clean(rows, off)
    assert rows == before
    assert len(kept) + sum(effect.dropped for effect in effects.values()) == len(rows)
    assert set(effects) == set(NAMES) - set(off)
    for effect in effects.values():
        assert len(effect.examples) == min(3, effect.changed + effect.dropped)
        assert all(old != new for old, new in effect.examples)
    assert all(r["answer"] for r in kept)


@given(made_up)
def test_cleaning_what_was_cleaned_changes_nothing(rows: list[Row]) -> None:
    kept = clean(rows)[0]
    assert clean(kept) == (kept, {name: Effect() for name in NAMES})


@given(made_up)
def test_what_is_kept_is_no_boilerplate_and_holds_only_words_of_the_answer(rows: list[Row]) -> None:
    said = {word for r in rows for word in r["answer"].split()}
    for r in clean(rows)[0]:
        assert not is_boilerplate(r)
        assert set(r["answer"].split()) <= said


@given(st.text(st.sampled_from(" \n\t\r\x0b\u00a0\u2028ab"), max_size=30))
def test_tidied_space_is_single_and_loses_no_word(text: str) -> None:
    tidied = tidy_space(text)
    assert tidied.split() == text.split()
    assert tidy_space(tidied) == tidied
    assert not any(pair in tidied for pair in ("  ", " \n", "\n ", "\n\n", "\t", "\r", "\u00a0", "\u2028"))
    assert tidied.count("\n") <= text.count("\n")


def test_boilerplate_is_a_link_list_or_a_table_with_or_without_prose() -> None:
    for answer in (TABLE, f"{PROSE} {TABLE}", "These resources address gout.", "The resources listed in this section help."):
        assert is_boilerplate(row(answer))
    for answer in (PROSE, "Prose. These resources address gout.", "An ontology provides a list."):
        assert not is_boilerplate(row(answer))


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_damage_is_found_with_the_words_around_it_and_nothing_is_mended() -> None:
    rows = [
        row("It doesnt hurt, and Sjgren syndrome is another thing."),
        row("Levels above 300 g/L in men, 1,000 g/mL in women or 2.5mol/L are high."),
        row("It does not hurt. Take 3 g a day, or 5 g/day, or 12 mg/L, or 300 µg/L."),
    ]
    before = copy.deepcopy(rows)
    found = damage(rows)
    assert rows == before
    assert [(number, [w for w in ("doesnt", "Sjgren") if w in words]) for number, words in found["letters"]] == [
        (0, ["doesnt", "Sjgren"]), (0, ["doesnt", "Sjgren"]),
    ]  # fmt: skip
    assert [number for number, _ in found["units"]] == [1, 1, 1]
    assert found["units"][0][1] == "Levels above 300 g/L in men, 1,000 g/mL"
    assert clean(rows)[0] == rows
    assert damage([]) == {"letters": [], "units": []}


# ---- the real data --------------------------------------------------------------------------------------------------


def test_cleaning_the_real_data_does_what_was_counted(real_rows: list[Row], real_cleaned: tuple[list[Row], dict[str, Effect]]) -> None:
    kept, effects = real_cleaned
    dropped = {name: effect.dropped for name, effect in effects.items() if effect.dropped}
    assert dropped == {"link list": 1086, "phenotype list": 1915, "navigation": 3, "heading alone": 17, DUPLICATE: 51}
    assert len(kept) == len(real_rows) - sum(dropped.values()) == 13_335
    changed = {name: effect.changed for name, effect in effects.items() if effect.changed}
    assert changed == {
        "phenotype tail": 328, "navigation": 534, "Key Points": 289, "heading repeated": 2077, "institute tail": 504, "white space": 6879,
    }  # fmt: skip
    assert sum(map(is_boilerplate, real_rows)) == 1086 + 2243
    assert not any(map(is_boilerplate, kept))


def test_cleaning_the_cleaned_real_data_changes_nothing(real_cleaned: tuple[list[Row], dict[str, Effect]]) -> None:
    kept, effects = real_cleaned
    assert clean(kept) == (kept, {name: Effect() for name in effects})


def test_with_the_phenotype_lists_left_in_the_real_data_is_as_large_as_was_counted(real_rows: list[Row]) -> None:
    kept, _ = clean(real_rows, without=["phenotype list"])
    assert len(kept) == 15_250


def test_the_prose_of_the_real_data_survives_its_navigation(real_cleaned: tuple[list[Row], dict[str, Effect]]) -> None:
    """Three kinds of answers that a rule which cuts whole sentences would lose facts from."""
    kept = {(r["source"], r["question"]): r["answer"] for r in real_cleaned[0]}
    for question, fact in {
        ("MPlusHealthTopics", "What is (are) Sleep Disorders ?"): "Is it hard for you to fall asleep",
        ("MPlusHealthTopics", "Do you have information about Hispanic American Health"): "Environmental factors",
        ("GARD", "What causes Chronic hiccups ?"): "Metabolic disorders",
    }.items():
        assert fact in kept[question]


def test_the_real_data_has_lost_letters_and_eight_units(real_rows: list[Row]) -> None:
    found = damage(real_rows)
    assert len(found["letters"]) == pytest.approx(1085, abs=50)
    numbers = {number for number, _ in found["units"]}
    assert len(found["units"]) == 8
    assert any("300 g/L in men and 200 g/L" in words for _, words in found["units"])
    assert {real_rows[number]["source"] for number in numbers} <= {"GHR", "GARD", "NIDDK", "NHLBI", "MPlusHealthTopics", "NINDS"}


# ---- cost -----------------------------------------------------------------------------------------------------------

# Answers of a megabyte each. In any of them a pattern that starts again at every place would read 10**12 characters.
MEGABYTE = """
def fill(text, head="", tail=""):
    return head + text * (1_000_000 // len(text)) + tail

answers = [
    fill(" ", "One", "two"), fill("\\n", "One", "two"), fill(" \\n", "One", "two"), fill("."), fill("?"), fill("a? "),
    fill("What is a? "), fill("What is a "), fill("What is a? ", tail="b"), fill("click here "), fill("Click here. "),
    fill("Click here\\n"), fill("("), fill(")"), fill("()", "(Watch the video "), fill("(Watch the video "),
    fill("(a) ", "(Watch the video "), fill("\\n", "A More on:"), fill(" \\n", "A More on:"), fill("More on: a\\n"),
    fill("On this page you will find "), fill("On this page you will find\\n"), fill("a ", "On this Page "), fill("a? ", "On this Page "),
    fill("On this Page "), fill("NIH: "), fill(" ", "NIH:"), fill("NIH: a. "), fill("\\n a", "Key Points -"),
    fill(" ", "Key Points", "a"), fill("\\n", "Key Points -"), fill(" ", "Topics", "a"), fill("Summary : "), fill(" ", "Summary", "a"),
    fill("Espaol\\n"), fill("The Human Phenotype Ontology provides the following list "), fill("1,"), fill("1"), fill("1 g/L "),
    fill("1,", tail=" g/L"), fill("doesnt "), fill("Top of page "), fill("These resources address "),
]
from medquad_utils.cleaning import clean, damage
rows = [{"question": "What is a ?", "answer": answer} for answer in answers]
clean(rows)
damage(rows)
print(len(rows))
"""


def test_a_megabyte_of_anything_is_cleaned_in_time_that_grows_with_its_length() -> None:
    done = subprocess.run([sys.executable, "-c", MEGABYTE], cwd=REPO, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["43"]
