"""The rules of cleaning: what each changes, what it must leave alone, and what it costs."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medquad_utils.cleaning import DUPLICATE, NAMES, Effect, clean, damage, is_boilerplate
from medquad_utils.files import Row


def row(answer: str, question: str = "What causes Gout ?", **known: Any) -> Row:
    return {"qtype": "causes", "question": question, "answer": answer, "source": None, **known}


TABLE = (
    "The Human Phenotype Ontology provides the following list of signs for Gout. Look it up.\n"
    "Swollen toe 90%\nFever 7.5%\nThis is a share; the sign or symptom may be rare or common."
)
PROSE = "Gout hurts. A toe swells at night."
LONG = f"Causes are {', '.join(f'cause number {n}' for n in range(20))}, for more click here."
# By rule: an answer, and what the rule alone makes of it ("" means that the row is dropped).
CHANGED = {
    "link list": {
        "these resources from MedlinePlus offer facts about gout: - One": "",
        "The resources listed in this section can tell you more.": "",
    },
    "phenotype list": {
        TABLE[: TABLE.index("This is")]: "", f"What are the signs of Young syndrome? {TABLE}": "",
    },
    "phenotype tail": {f"{PROSE}\n{TABLE}\nSee a doctor.": f"{PROSE}\n\nSee a doctor."},
    "navigation": {
        f"Espaol\n   \n  {PROSE}": PROSE,
        f"Summary: {PROSE}": PROSE,
        f"On this Page General What is gout? Who has it? {PROSE}": PROSE,
        "- Age\n On this page, you'll find links to all of them. Rest it.": "- Age\n  Rest it.",
        "On this page you will find nothing but links.": "",
        "Gout hurts. Top of page A toe swells.": "Gout hurts.  A toe swells.",
        f"{PROSE}\n   More on: Painful Toes\nRest it.": f"{PROSE}\n\nRest it.",
        f"{PROSE} (Watch the video about toes (1 minute). Press the button.)": PROSE,
        "Gout hurts. To see it, please click here. A toe swells.": "Gout hurts. A toe swells.",
        "It hurts.Click here: http://toes.example.org/a.html. Type 2.5.": "It hurts. Type 2.5.",
        "Levels of 2.5 or more are high, click here. A toe swells.": "A toe swells.",
        "Frequently Asked Queestions (FAQs)": "",
    },
    "Key Points": {f"Key Points\n - Gout. - Toes.\n   \n \n {PROSE}\n\nRest.": f"{PROSE}\n\nRest."},
    "heading alone": {"What causes gout?": "", "What is gout? Is it inherited? ": ""},
    "heading repeated": {f"What is gout? Is type 2.5 gout inherited?\n\n{PROSE}": PROSE},
    "institute tail": {
        f"{PROSE}\n\nNIH: National Institute on Aging": PROSE,
        f"{PROSE}\nNIH: National Eye Institute NIH: An eye\n NIH: An ear \n": PROSE,
    },
    "white space": {"  One \t two\r\n \n\n  three\u00a0four five \n": "One two\nthree four five"},
    "under five words": {"Only four words here.": ""},
}  # fmt: skip
# By rule: answers that look alike and stay as they are.
LEFT_ALONE = {
    "link list": [f"{PROSE} These resources address the rest of it."],
    "phenotype list": [f"What are the signs of Gout? {PROSE} {TABLE}", f"{TABLE} {PROSE}"],
    "phenotype tail": [TABLE, "An ontology of phenotypes provides the following list of words."],
    "navigation": [
        "Espaola is a place in New Mexico.", LONG, "Topics in the care of toes are many.",
        "Summary of the trial: it failed. In summary : gout hurts.",
        "On this Page nothing is asked. Write your name on this page, you may need it.",
        "The top of page three shows a toe. There is More on: this line than one may think.",
        "(Watch the video of which nobody closed the bracket", f" {PROSE} ",
    ],
    "Key Points": [f"Key Points\n - Toes. {PROSE}", f"{PROSE}\nKey Points\n - A.\n\n Rest."],
    "heading alone": ["Gout is what?", "Have you ever felt pain in your toe?", "What causes gout"],
    "heading repeated": [
        "What causes gout?", "Do you wake at night? Does your toe hurt? It may be gout.",
        "Can be had at any age. Who would not be afraid? Rest it.",
        f"What {'very ' * 60}long heading is this? {PROSE} What causes gout? Crystals do.",
    ],
    "institute tail": [
        "NIH: National Eye Institute says that it hurts.", f"NIH: An eye\n{PROSE}",
        f"{PROSE} {'NIH: abcd ' * 30}x.",
    ],
    "white space": [f"{PROSE}\nRest it."],
    "under five words": ["There are five words here."],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES[:-1])
def test_rule_changes_what_its_name_says_and_nothing_alike(name: str) -> None:
    assert name in CHANGED and name in LEFT_ALONE, f"the rule {name!r} needs examples above"
    others = [other for other in NAMES if other != name]
    for before, after in CHANGED[name].items():
        kept, effects = clean([row(before)], without=others)
        assert [r["answer"] for r in kept] == ([after] if after else [])
        assert effects == {name: Effect(int(bool(after)), int(not after), [(before, after)])}
    rows = [row(answer) for answer in LEFT_ALONE[name]]
    assert clean(rows, without=others) == (rows, {name: Effect()})
    dropped = [row(b, f"What is {n} ?") for n, (b, a) in enumerate(CHANGED[name].items()) if not a]
    kept, _ = clean(dropped, without=[name, "under five words"])
    assert len(kept) == len(dropped), "with the rule off, no other rule drops its rows"


def test_exact_duplicate_has_the_same_question_and_answer() -> None:
    first, again = row(PROSE, source="first"), row(PROSE, source="second")
    spaced = row(PROSE.replace(" ", "  "), "What  causes\nGout ?")
    unlike = [row(PROSE, "What is gout ?"), row(PROSE + "!")]
    kept, effects = clean([first, again, *unlike, spaced])
    assert kept == [first, *unlike]
    assert effects[DUPLICATE] == Effect(0, 2, [(PROSE, ""), (PROSE, "")])
    assert clean([first, again, spaced], without=["white space"])[0] == [first, spaced]


def test_rules_work_one_after_the_other_and_count_every_row() -> None:
    prose = PROSE.replace(" A", "   A")
    answer = f"Summary : What causes gout?  {prose}  (Watch the video.) {TABLE}\n\n NIH: On Aging"
    rows = [row(answer, f"What is {n} ?") for n in range(7)] + [row("Too short.")] * 5
    kept, effects = clean(rows)
    assert [r["answer"] for r in kept] == [PROSE] * 7
    names = ("phenotype tail", "navigation", "heading repeated", "institute tail", "white space")
    assert {name: e.changed for name, e in effects.items() if e.changed} == dict.fromkeys(names, 7)
    assert effects["under five words"] == Effect(0, 5, [("Too short.", "")] * 3), "three examples"


FRONTS = ("", "Espaol\n", "Espaol\n\nSummary : ", "On this Page What is it? ", "Key Points\n -\n\n")
PIECES = (
    "What causes gout?", "Is type 2.5 gout inherited?", "Gout hurts.", "Do you wake up?", "Rest it",
    "- one - two", "Only four words here.", "2.5 g/L or more.", "NIH: it studies gout.", TABLE,
    TABLE[:90], "Top of page", "Click here.", "To see it, click here and wait.", LONG, "(", ")",
    "(Watch the video (1 minute) now.)", "\nMore on: Toes\n", "On this page, you'll find links.",
    "Topics", "the following list", "NIH: National Eye Institute",
)  # fmt: skip
SPACES = (" ", "  ", "\n", "\n \n", "\t", "\u00a0", "\r\n")
pieces = st.sampled_from(PIECES)
bodies = st.builds(str.join, st.sampled_from(SPACES), st.lists(pieces, min_size=1, max_size=8))
articles = st.builds(str.__add__, st.sampled_from(FRONTS), bodies)
questions = st.sampled_from(["What causes Gout ?", "What  causes\nGout ?", "What is gout ?"])
rows_of_articles = st.lists(st.builds(row, articles, questions), max_size=12)


@example([row("Some advice for all people." + "\nNIH: National Eye Institute" * 2)], [])
@given(rows_of_articles, st.lists(st.sampled_from(NAMES), max_size=3))
def test_cleaning_adds_up_adds_no_word_and_is_stable(rows: list[Row], off: list[str]) -> None:
    before = copy.deepcopy(rows)
    kept, effects = clean(rows, off)
    assert rows == before, "no row is changed in place"
    assert len(kept) + sum(effect.dropped for effect in effects.values()) == len(rows)
    assert set(effects) == set(NAMES) - set(off)
    said = {word for r in rows for word in r["answer"].split()}
    assert all(r["answer"] and set(r["answer"].split()) <= said for r in kept)
    kept, _ = clean(rows)
    assert not any(map(is_boilerplate, kept))
    assert clean(kept) == (kept, {name: Effect() for name in NAMES})


def test_no_two_pieces_need_a_second_pass() -> None:
    front = "Some advice for all people.\n"
    rows = [row(f"{front}{one}\n{other}") for one, other in itertools.product(PIECES, repeat=2)]
    kept, _ = clean(rows)
    assert clean(kept)[0] == kept


def test_damage_is_found_with_the_words_around_it_and_not_repaired() -> None:
    rows = [
        row("It doesnt hurt, and Sjgren syndrome is another thing."),
        row("Levels above 300 g/L in men, 1,000 g/mL in women or 2.5mol/L are high."),
        row("It does not hurt. Take 3 g a day, or 5 g/day, or 12 mg/L, or 300 µg/L."),
    ]
    found = damage(rows)
    assert found["letters"] == [(0, rows[0]["answer"][:29]), (0, rows[0]["answer"][:46])]
    assert [number for number, _ in found["units"]] == [1, 1, 1]
    assert found["units"][0][1] == "Levels above 300 g/L in men, 1,000 g/mL"
    assert clean(rows)[0] == rows


@pytest.mark.full
def test_cleaning_the_real_data_does_what_was_counted(real_rows: Any, real_cleaned: Any) -> None:
    kept, effects = real_cleaned
    dropped = {name: effect.dropped for name, effect in effects.items() if effect.dropped}
    counts = {"link list": 1086, "phenotype list": 1915, "navigation": 3, "heading alone": 17}
    assert dropped == counts | {DUPLICATE: 51}
    assert len(kept) == len(real_rows) - sum(dropped.values()) == 13_351
    assert {name: effect.changed for name, effect in effects.items() if effect.changed} == {
        "phenotype tail": 328, "navigation": 534, "Key Points": 289, "heading repeated": 2077,
        "institute tail": 504, "white space": 6894,
    }  # fmt: skip
    assert sum(map(is_boilerplate, real_rows)) == 1086 + 2243
    assert clean(kept) == (kept, {name: Effect() for name in effects})
    assert len(clean(real_rows, without=["phenotype list"])[0]) == 15_266
    answers = {(r["source"], r["question"]): r["answer"] for r in kept}
    hiccups = answers["GARD", "What causes Chronic hiccups ?"]
    assert "Metabolic disorders" in hiccups, "a rule that cuts whole sentences would lose it"
    found = damage(real_rows)
    assert len(found["letters"]) == pytest.approx(1085, abs=50)
    assert len(found["units"]) == 8
    assert any("300 g/L in men and 200 g/L" in words for _, words in found["units"])


CODE = """import json, sys
from medquad_utils.cleaning import clean, damage
pairs = [(h, f * (500_000 // len(f))) for h, f in json.loads(sys.argv[1])]
answers = [h + f + end for end in ("two", "x.") for h, f in pairs]
rows = [{"question": "What is a ?", "answer": answer} for answer in answers]
clean(rows), damage(rows)"""


@pytest.mark.full
def test_long_answers_are_cleaned_in_linear_time() -> None:
    """A pattern that starts again at every place would take hours."""
    marks = (".", "?", "a? ", "a ", "1,", "1", "()", "doesnt ", "Click here\n", "NIH: abcd ")
    fills = (*PIECES, *SPACES, *marks, "NIH: abcd\n")
    heads = (*FRONTS[3:], "(Watch the video ", "A More on:", "NIH:", "Topics", "Summary")
    pairs = [*product(("", "One"), fills), *product(heads, (" ", "\n", "()", "a? ", "NIH: "))]
    subprocess.run([sys.executable, "-c", CODE, json.dumps(pairs)], check=True, timeout=120)
