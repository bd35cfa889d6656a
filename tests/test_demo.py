"""The demo: what it answers, what it shows as text, and the page in a real browser."""

from __future__ import annotations

import re
import runpy
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock, Timer
from typing import Any
from unittest.mock import Mock

import build_sample
import httpx
import pytest
import yaml
from conftest import NASTY, REPO, Markup, chromium, tiny
from playwright.sync_api import Page, expect

from medquad_utils import CourseError, cli, demo, generation, serving
from medquad_utils.chat import NOTICE, THREE_QUESTIONS, tidy_question
from medquad_utils.machine import Hardware
from medquad_utils.profiles import TINY_MODEL, resolve
from medquad_utils.retrieval import ARCHIVED, COURSE_TEXT, NO_SOURCE, Hit, Support
from medquad_utils.safety import EMERGENCY

Patch, TINY = pytest.MonkeyPatch, ["--profile", "tiny"]
ASTHMA, CHEST = "What are the symptoms of asthma?", "My father has crushing chest pain"
FOREIGN = " ![x](http://192.0.2.1/a.png) <svg onload=hacked=1> $$x^2$$\n\n# next *line*"
gate, closed, real = Event(), Event(), generation.stream


def scripted(model: Any, tokenizer: Any, question: str, most: int) -> Iterator[str]:
    """Stands in for ``generation.stream`` where a question has one of these words."""
    if "slowly" in question:
        try:
            yield from (time.sleep(0.05) or f"word{n} " for n in range(1000))
        finally:
            closed.set()
    elif "patiently" in question:
        assert gate.wait(60)
        yield "after the gate"
    elif "markup" in question:
        yield NASTY + FOREIGN
    else:
        yield from real(model, tokenizer, question, most)


@pytest.fixture(scope="module")
def bot(trained_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> demo.Bot:
    return demo.load(tiny(tmp_path_factory.mktemp("runs")), trained_adapter)


def test_the_base_answers_without_its_adapter(bot: demo.Bot, tiny_base: Any) -> None:
    base = "".join(real(tiny_base, bot.tokenizer, ASTHMA, 24))
    tuned = "".join(bot.stream(ASTHMA, "tuned", 24))
    assert "".join(bot.stream(ASTHMA, "base", 24)) == base != tuned
    assert "".join(bot.stream(ASTHMA, "tuned", 24)) == tuned, "the adapter is on again"


def test_a_merged_model_has_no_base_to_ask(tmp_path: Path) -> None:
    merged = demo.load(tiny(tmp_path), Path(shutil.copytree(TINY_MODEL, tmp_path / "merged")))
    assert merged.variants == ["tuned"] and "".join(merged.stream(ASTHMA, "tuned", 8))


def test_answers_come_one_at_a_time_and_within_the_limit(bot: demo.Bot, monkeypatch: Patch) -> None:
    running, most = [], []

    def echo(model: Any, tokenizer: Any, question: str, limit: int) -> Iterator[str]:
        running.append(question)
        most.append((len(running), limit))
        time.sleep(0.005)
        yield f"You asked: {question}"
        running.remove(question)

    monkeypatch.setattr(generation, "stream", echo)
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda n: "".join(bot.stream(str(n), "tuned", 10**n)), range(20)))
    assert said == [f"You asked: {n}" for n in range(20)]
    assert {together for together, _ in most} == {1}
    assert {limit for _, limit in most} == {1, 10, bot.plan.max_new_tokens}


def test_closing_the_demo_ends_the_answer_that_is_being_given(bot: demo.Bot) -> None:
    own = replace(bot, closing=Event(), free=Lock())
    pieces = own.stream(ASTHMA, "base", 64)
    next(pieces)
    own.closing.set()
    assert list(pieces) == [] and own.free.acquire(blocking=False)


def test_the_address_is_printed_when_the_page_is_up_and_the_last_answer_ends(
    bot: demo.Bot, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, replies = replace(bot, closing=Event(), free=Lock()), list[httpx.Response]()

    def visit(_: float) -> None:
        (address,) = re.findall(r"^The demo runs at (http://\S+) ", capsys.readouterr().out)
        parts = [b" " * demo.MAX_BYTES, b" "]
        for content in (b"".join(parts), iter(parts)):  # with its length, and without
            join = address.rstrip("/") + "/gradio_api/queue/join"
            replies.append(httpx.post(join, content=content, trust_env=False))
        replies.append(httpx.get(address, trust_env=False))
        assert own.free.acquire()  # an answer goes on
        Timer(1.5, own.free.release).start()
        raise KeyboardInterrupt

    # It shuts all log handlers, and absl's, which rouge_score brings, closes pytest's own stream.
    monkeypatch.setattr("logging.config.dictConfig", Mock())
    monkeypatch.setattr("signal.signal", Mock())
    monkeypatch.setattr(demo, "time", Mock(sleep=visit))
    demo.serve(own, port=serving.check_port())
    assert not own.free.locked() and own.closing.is_set()
    assert [reply.status_code for reply in replies] == [413, 413, 200]
    assert {reply.headers["content-security-policy"] for reply in replies} == {demo.POLICY}
    assert capsys.readouterr().out == "\nThe demo has stopped.\n"


def test_a_page_keeps_its_last_turns_only(bot: demo.Bot) -> None:
    ask = next(f for f in demo.page(bot).fns.values() if f.name == "ask")
    turns: list[demo.Turn] = []
    for _ in range(demo.MAX_TURNS + 2):
        ask.fn(CHEST, turns, "", "tuned", 8)
    assert len(turns) == demo.MAX_TURNS


@pytest.mark.parametrize(("text", "qtype", "asked"), [
    ("gout", "", "gout"), ("gout ", "causes", "What causes gout?"), ("  ", "causes", "  "),
    ("Who is at risk for Gout? ?", "causes", "What causes Gout?"),
    ("Does tea help against gout?", "causes", "Does tea help against gout?"),
    *((r["focus"], r["qtype"], tidy_question(r["question"])) for r in build_sample.rows()[:9]),
])  # fmt: skip
def test_a_type_makes_a_question_of_a_name_only(text: str, qtype: str, asked: str) -> None:
    assert demo.phrase(text, qtype).lower() == asked.lower()


def test_an_emergency_gets_its_message_at_once_and_no_answer(
    bot: demo.Bot, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(generation, "stream", lambda *_: pytest.fail("the model was asked"))
    ask, answer = (
        next(f for f in demo.page(bot).fns.values() if f.name == name) for name in ("ask", "answer")
    )
    turns: list[demo.Turn] = []
    _, messages = ask.fn(CHEST, turns, "", "tuned", 8)
    assert ask.queue is False and EMERGENCY in messages[-1]["content"]
    assert "heart attack" not in messages[-1]["content"], "what to do, and no diagnosis"
    assert list(answer.fn(turns)) == [] and turns[0].answer == "" and not demo.unfinished(turns)
    assert list(bot.stream(CHEST, "tuned", 8)) == [EMERGENCY], "whoever calls it"
    refused = bot.ask(CHEST + " why" * 1000, "", "tuned", 8)
    assert refused.problem and EMERGENCY in refused.markup


def test_a_question_without_a_whole_answer_says_why(bot: demo.Bot, monkeypatch: Patch) -> None:
    def asked(text: str) -> demo.Turn:
        return bot.ask(text, "", "tuned", 64)

    def stopped(answer: str) -> demo.Turn:
        end = next(f for f in demo.page(bot).fns.values() if f.name == "end")
        end.fn(turns := [replace(asked(ASTHMA), answer=answer)])
        return turns[0]

    def fails(*_: Any) -> Iterator[str]:
        yield "So far "
        raise RuntimeError("no memory left in /secret/place")

    monkeypatch.setattr(generation, "stream", fails)
    list(bot.answer(broken := asked(ASTHMA)))
    assert broken.answer == "So far "
    for turn, problem in (
        (asked("   "), "The question is empty: write one"),
        (asked("why " * 7_500), demo.TOO_LONG),
        (asked("a b c d " * 240), "The question is too long: with its answer"),
        (stopped(""), demo.UNANSWERED),
        (stopped("So"), demo.STOPPED),
        (broken, demo.BROKEN_OFF),
    ):
        assert turn.problem.startswith(problem) and problem in turn.markup
    assert asked(ASTHMA).problem == ""


def test_no_text_of_a_person_a_model_or_a_source_becomes_markup() -> None:
    row, page = build_sample.rows()[0], "https://www.niddk.nih.gov/gout?a=1&b=2"
    close = Hit({**row, "focus": "<b>Gout</b>", "source": "NIDDK", "url": page}, 0.9)
    evil = Hit({**row, "focus": NASTY, "source": "<i>x</i>", "url": "javascript:alert(1)"}, 0.8)
    supports = [Support("a", 0.9, close, "a"), Support("b", 0.1, None, "")]
    turn = demo.Turn("<u>q</u>", answer=NASTY, hits=[close, evil], supports=supports)
    found = Markup(turn.markup)
    assert found.tags <= {"p", "div", "strong", "ol", "li", "a"}
    assert re.findall(r'href="([^"]*)"', turn.markup) == [page.replace("&", "&amp;")]
    gout = f"<b>Gout</b>: information · NIDDK · {page}"
    for text in (gout, ARCHIVED, NASTY, "javascript:alert(1)", "a close passage: 1 of 2"):
        assert text in found.text
    assert NO_SOURCE in Markup(replace(turn, hits=[]).markup).text.lower()
    dose = replace(turn, answer="Take <b>300 mg</b>.", supports=[])
    assert "300 mg: no source for this number" in Markup(dose.markup).text
    assert Markup(demo.messages([turn])[0]["content"]).text == "<u>q</u>"


def test_a_space_has_the_tested_versions_the_notice_and_an_app_that_runs(
    tmp_path: Path, trained_adapter: Path, monkeypatch: Patch
) -> None:
    folder, served = tmp_path / "space", []
    for _ in "ab":  # the second folder replaces the first
        assert cli.main(["demo", *TINY, "--space", str(folder), "--repo", "me/chat"]) == 0
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert set(lines[1:]) <= set((REPO / "constraints.txt").read_text().splitlines())
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(header)
    assert (card["sdk"], card["models"], card["license"]) == ("gradio", ["me/chat"], "apache-2.0")
    assert f"gradio=={card['sdk_version']}" in lines and NOTICE in text
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo: str(trained_adapter))
    monkeypatch.setattr(demo, "serve", lambda bot, host, port: served.append((bot.variants, host)))
    monkeypatch.setenv("MEDQUAD_OUT", str(tmp_path / "runs"))
    runpy.run_path(str(folder / "app.py"), run_name="__main__")
    assert served == [(["tuned", "base"], "0.0.0.0")]
    (folder / "thesis.txt").touch()
    with pytest.raises(CourseError, match=r"it holds thesis\.txt"):
        demo.write_space(folder, "me/chat", tiny(tmp_path))


def test_a_space_of_a_llama_says_what_its_licence_asks(tmp_path: Path) -> None:
    llama = resolve("llama-8b", hardware=Hardware("cuda", "T4", 16.0, (7, 5)), out=str(tmp_path))
    demo.write_space(tmp_path / "space", "me/llama-3-medquad", llama)
    text = (tmp_path / "space" / "README.md").read_text()
    assert f'"llama-8b", "{llama.model_id}")' in (tmp_path / "space" / "app.py").read_text()
    assert "license: llama3" in text and "Built with Meta Llama 3" in text and "HF_TOKEN" in text


# ---- in the browser -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def new_page(bot: demo.Bot) -> Iterator[Any]:
    """A function that opens a page on a running demo; ``page.heard`` is all that it asks for."""
    with Patch.context() as patch, chromium() as browser:
        patch.setattr(generation, "stream", scripted)
        patch.setattr(demo, "MAX_WAITING", 2)
        expect.set_options(timeout=30_000)
        with demo.running(replace(bot, closing=Event()), port=serving.check_port()) as address:

            def opened(width: int = 1280) -> Page:
                page = browser.new_context(viewport={"width": width, "height": 740}).new_page()
                page.heard = []
                page.on("request", lambda request: page.heard.append(request.url))
                page.on("console", lambda m: page.heard.append(m.text) if m.type == "error" else 0)
                page.on("dialog", lambda dialog: page.heard.append("a dialog"))
                page.goto(address)
                page.get_by_placeholder("Ask about a disease").wait_for()
                return page

            yield opened


def ask(page: Page, question: str) -> None:
    page.get_by_placeholder("Ask about a disease").fill(question)
    page.keyboard.press("Enter")


def outside(page: Page) -> list[str]:
    """What the page asked of another server, printed as an error or opened as a dialog."""
    return [heard for heard in page.heard if not heard.startswith((page.url, "data:", "blob:"))]


@pytest.mark.full
def test_an_answer_has_sources_and_nothing_comes_from_elsewhere(new_page: Any) -> None:
    page = new_page(360)  # as wide as a phone
    page.get_by_role("button", name=THREE_QUESTIONS[1]).click()
    expect(page.locator("#chat .sources")).to_contain_text("eczema", ignore_case=True)
    expect(page.locator("#chat .sources")).to_contain_text(COURSE_TEXT)
    expect(page.locator("#notice p")).to_have_text(NOTICE)
    expect(page.locator("#notice p")).to_be_in_viewport(ratio=0.99)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert outside(page) == []
    for path, status in (("docs", 404), ("openapi.json", 404), ("monitoring", 403)):
        assert httpx.get(page.url + path, trust_env=False).status_code == status
    large = httpx.post(page.url, content=b" " * (demo.MAX_BYTES + 1), trust_env=False)
    assert large.status_code == 413
    config = httpx.get(page.url + "config", trust_env=False).json()
    assert config["analytics_enabled"] is False


@pytest.mark.full
def test_an_answer_grows_until_it_is_stopped_then_the_next_one_comes(new_page: Any) -> None:
    page = new_page()
    ask(page, "say it slowly")
    answer = page.locator("#chat .answer")
    for number in (3, 6, 12):  # each is seen before the next is there
        expect(answer).to_contain_text(f"word{number} ")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#chat .problem")).to_have_text(demo.STOPPED)
    assert closed.wait(30), "the generation goes on in secret"
    page.get_by_role("radio", name=demo.VARIANTS["base"]).check()
    ask(page, ASTHMA)
    expect(page.locator("#chat .sources")).to_be_visible()
    expect(page.locator("#chat .variant").nth(1)).to_have_text(demo.VARIANTS["base"])


@pytest.mark.full
def test_an_emergency_does_not_wait_for_others(new_page: Any) -> None:
    waits, urgent = new_page(), new_page()  # the second would have to wait for the first
    ask(waits, "What is it, patiently?")
    ask(urgent, CHEST)
    expect(urgent.locator("#chat .flag")).to_contain_text(EMERGENCY)
    expect(waits.locator("#chat .answer")).to_have_count(0)
    crowd = [new_page() for _ in range(3)]  # two may wait
    for page in crowd:
        ask(page, ASTHMA)
        expect(page.locator("#chat .question")).to_be_visible()
    expect(crowd[2].locator("#chat .problem")).to_have_text(demo.UNANSWERED)
    expect(crowd[2].get_by_role("button", name="Ask", exact=True)).to_be_visible()
    gate.set()
    expect(waits.locator("#chat .answer")).to_have_text("after the gate")
    expect(urgent.locator("#chat .answer")).to_have_count(0)


@pytest.mark.full
def test_markup_is_shown_as_text_and_loads_nothing(new_page: Any) -> None:
    page, asked = new_page(), f"markup: {NASTY} <img src=http://192.0.2.1/b.png onerror=hacked=1>"
    ask(page, asked)
    expect(page.locator("#chat .sources")).to_be_visible()
    assert page.locator("#chat .answer").all_text_contents() == [NASTY + FOREIGN]
    assert page.locator("#chat .question").all_text_contents() == [tidy_question(asked)]
    assert page.locator("#chat :is(script, svg[onload], b, em, h1, [onerror], .katex)").count() == 0
    assert page.evaluate("typeof hacked") == "undefined" and outside(page) == []
    with page.expect_console_message(lambda m: "Content Security Policy" in m.text):
        page.evaluate("() => { new Image().src = 'http://127.0.0.2:9/x.png' }")  # the second wall
