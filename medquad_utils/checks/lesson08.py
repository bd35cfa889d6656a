"""Lesson 08: allowed names, numbers that no metric gives, an answer that is whole."""

from medquad_utils.checks.common import TEXTS, Exercise, items, letters

_RUN = {"rouge": 0.6167, "rows": 1042, "seconds": 98.0, "safety": {"all": {"share": 0.0833}}}


def _stream(*pieces: tuple[str | None, str | None]) -> tuple[list[dict[str, str | None]]]:
    return ([{"content": content, "finish_reason": reason} for content, reason in pieces],)


ex_08_1 = letters("bceg", 'Give the letters of all allowed names, for example "ad" or {"a", "d"}.',
    "Right: the name says what a model is derived from, through any number of steps.",
    a="a: the licence says at which place in the name the words must be. Where are they here?",
    d="d: look at every character. Which characters may a name on the Hub have?",
    f="f: what is a model derived from, if its base is itself derived from another model?",
    b="One of the names made from Llama 3 keeps every rule. Capital letters do not matter.",
    c="Not every base is a Llama. What does SmolLM2's licence say about names?",
    e="e: which licence is it? Llama 3 and Llama 3.2 require different beginnings.",
    g="A model that is tuned from a derived model may have an allowed name too.")  # fmt: skip

ex_08_2 = Exercise(TEXTS,
    "It gets a text and a dict, and returns a list; an empty one if all is proven.", [
    (("ROUGE-L 0.99", _RUN), ["0.99"], [([], "0.99 is in no metric.")]),
    (("ROUGE-L 0.6167", _RUN), [], [(["0.6167"], "A number of the metrics is proven.")]),
    (("0.62 or 0.617", _RUN), [], [(["0.62", "0.617"], "Round the metric as the text does.")]),
    (("a share of 0.08", _RUN), [], [(["0.08"], "A metric can be a dict: look into each.")]),
    (("1,042 rows", _RUN), [], [(["1", "042"], "1,042 is one number, with a comma in it.")]),
    (("98 seconds", _RUN), [], [(["98"], "98 and 98.0 are the same number.")]),
    (("ROUGE-L 0.61", _RUN), ["0.61"], [([], "0.61 is near 0.6167: nearness is no proof.")]),
    (("0.5 of 3 in 0.62", _RUN), ["0.5", "3"], [(["3", "0.5"], "Keep the order of the text.")]),
    (("7, 0.62 and 8.", {"a": 7, "b": 0.6167, "c": 8}), [], [
        (["7,"], "A comma that ends a clause is no part of a number.")]),
    (("no numbers here", _RUN), [], [(["0"], "A text without numbers has no unproven one.")]),
], "Right: every number of an honest card comes from a file.")  # fmt: skip

ex_08_3 = Exercise(("a text, and True or False", lambda value: items(value, str | bool)),
    "It gets a list of dicts; content and finish_reason may each be None.", [
    (_stream((None, None), ("It", None), (" hurts", None), (None, "stop")), ("It hurts", True), [
        (("It hurts", False), "The reason is 'stop': the model itself ended this answer."),
        (("It  hurts", True), "Return all pieces, with nothing between, and True or False."),
    ]),
    (_stream(("A", None)), ("A", False), [(("A", True), "Without a finish_reason it broke off.")]),
    (_stream(("A", "length")), ("A", False), [(("A", True), "'length': who ended the answer?")]),
    (_stream(("A", "stop")), ("A", True), [(("", True), "The last piece may hold text too.")]),
    (_stream(), ("", False), [(("", True), "A stream without any piece is not whole.")]),
], "Right: a cut answer looks like a short one, and only the reason tells them apart.")  # fmt: skip
