"""The demo as a person meets it, in a real browser: one server for the whole file, the embedded model with a random adapter.

Questions that hold one of the words of ``Script`` are answered by a script instead: slowly, with markup, or failing.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

import httpx
import pytest
import yaml
from conftest import NASTY, Markup, chromium
from playwright.sync_api import Browser, Page, expect

from medquad_utils import cli, demo, generation
from medquad_utils.arms import adapted
from medquad_utils.assets import sample
from medquad_utils.chat import NOTICE, THREE_QUESTIONS, tidy_question
from medquad_utils.explanation import Support
from medquad_utils.profiles import TINY_MODEL, CourseError, Hardware, Plan, resolve
from medquad_utils.retrieval import ARCHIVED, COURSE_TEXT, NO_SOURCE, Hit
from medquad_utils.safety import EMERGENCY, red_flag
from medquad_utils.serving import free_port

REPO = Path(__file__).parent.parent
ASTHMA = "What are the symptoms of asthma?"
CHEST = "My father has crushing chest pain and cannot breathe"


class Script:
    """Stands in for ``generation.stream``, and for questions with none of its words calls it."""

    def __init__(self) -> None:
        self.real = generation.stream
        self.gate, self.closed = Event(), Event()
        self.busy, self.lock, self.most = 0, Lock(), 0

    def __call__(self, model: Any, tokenizer: Any, question: str, most: int) -> Iterator[str]:
        with self.lock:
            self.busy += 1
            self.most = max(self.most, self.busy)
        try:
            yield from self.pieces(question) or self.real(model, tokenizer, question, most)
        finally:
            with self.lock:
                self.busy -= 1
            self.closed.set()

    def pieces(self, question: str) -> Iterator[str] | None:
        if "slowly" in question:
            return (time.sleep(0.05) or f"word{n} " for n in range(1000))
        if "echo" in question:
            return iter(["You asked: ", question])
        if "markup" in question:
            return iter([NASTY, " ![x](http://192.0.2.1/a.png) <svg onload=hacked=1> $$x^2$$\n\n# next *line*"])
        if "breaks" in question:
            return self.breaking()
        if "chest pain" in question:
            return self.gated()
        return None

    def breaking(self) -> Iterator[str]:
        yield "So far "
        raise RuntimeError("no memory left in /secret/place")

    def gated(self) -> Iterator[str]:
        assert self.gate.wait(60)
        yield "after the gate"


script = Script()
connected: list[Any] = []  # where this process connects to, outside this machine, while the server runs
watching = Event()


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching.is_set() and event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments
        if isinstance(address, tuple) and str(address[0]) not in ("127.0.0.1", "localhost", "::1"):
            connected.append(address)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return resolve("tiny", hardware=Hardware("cpu", "any", 16.0, cores=2), out=str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def bot(plan: Plan, tiny_adapter: Path) -> demo.Bot:
    return demo.load(plan, tiny_adapter)


@pytest.fixture(scope="module")
def server(bot: demo.Bot) -> Iterator[str]:
    """The address of a running demo."""
    sys.addaudithook(_watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "stream", script)
        patch.setattr(demo, "RATE", (1000, 60.0))
        watching.set()
        with demo.running(replace(bot, closing=Event()), port=free_port()) as address:
            yield address
        watching.clear()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


class Tab:
    """One open page, and what a person does in it."""

    def __init__(self, browser: Browser, address: str, **settings: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | settings))
        self.context.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text) if message.type == "error" else None)
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        self.page.goto(address)
        self.box = self.page.get_by_placeholder("Ask about a disease")
        self.box.wait_for()

    def ask(self, question: str) -> None:
        self.box.fill(question)
        self.page.get_by_role("button", name="Ask", exact=True).click()

    def answers(self) -> list[str]:
        return self.page.locator("#chat .answer").all_text_contents()

    def ready(self) -> None:
        """Wait until the next question can be asked."""
        self.page.get_by_role("button", name="Ask", exact=True).wait_for()


@pytest.fixture
def tab(browser: Browser, server: str) -> Iterator[Tab]:
    opened = Tab(browser, server)
    yield opened
    opened.context.close()


# ---- in the browser -------------------------------------------------------------------------------------------------


def test_an_answer_has_sources_and_the_notice_and_nothing_comes_from_elsewhere(tab: Tab, server: str, bot: demo.Bot) -> None:
    expect(tab.page.locator("#notice")).to_contain_text(NOTICE)
    for question in THREE_QUESTIONS:
        expect(tab.page.get_by_role("button", name=question)).to_be_visible()
    tab.ask(ASTHMA)
    sources = tab.page.locator("#chat .sources")
    expect(sources).to_contain_text("Asthma")
    expect(sources).to_contain_text(COURSE_TEXT)
    tab.ready()
    assert tab.answers() == ["".join(script.real(bot.model, bot.tokenizer, ASTHMA, bot.plan.max_new_tokens)).strip()]
    expect(tab.page.locator("#notice")).to_be_in_viewport()
    outside = [url for url in tab.requests if not url.startswith((server, "data:", "blob:"))]
    assert outside == []
    assert tab.said == [], "no error and no blocked request on the console"
    assert connected == [], "nor did the server call anybody"
    kept = tab.page.evaluate("() => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert "asthma" not in kept, "a question is kept nowhere in the browser"


def test_a_starter_question_is_asked_by_one_click(tab: Tab) -> None:
    tab.page.get_by_role("button", name=THREE_QUESTIONS[1]).click()
    expect(tab.page.locator("#chat .sources")).to_contain_text("eczema", ignore_case=True)
    expect(tab.page.locator("#chat .user")).to_contain_text(THREE_QUESTIONS[1])


def test_the_answer_grows_until_it_is_stopped_and_then_the_next_one_comes(tab: Tab) -> None:
    tab.ask("say it slowly")
    answer = tab.page.locator("#chat .answer")
    for number in (3, 6, 12):  # each is seen before the next is there
        expect(answer).to_contain_text(f"word{number} ")
    seen = len(answer.inner_text().split())
    assert 12 <= seen < 1000
    script.closed.clear()
    tab.page.get_by_role("button", name="Stop", exact=True).click()
    expect(tab.page.locator("#chat .problem")).to_have_text(demo.STOPPED)
    assert script.closed.wait(30), "the generation goes on in secret"
    stopped = answer.inner_text()
    tab.ask("echo one")
    expect(answer.nth(1)).to_have_text("You asked: echo one")
    assert answer.nth(0).inner_text() == stopped


def test_the_switch_takes_the_adapter_off_and_puts_it_on_again(tab: Tab, bot: demo.Bot) -> None:
    expected = {}
    for arm in demo.ARMS:
        with adapted(bot.model, arm):
            expected[arm] = "".join(script.real(bot.model, bot.tokenizer, ASTHMA, bot.plan.max_new_tokens)).strip()
    assert expected["base"] != expected["tuned"]
    for number, arm in enumerate(("base", "tuned"), start=1):
        tab.page.get_by_role("radio", name=demo.ARMS[arm]).check()
        tab.ask(ASTHMA)
        expect(tab.page.locator("#chat .sources")).to_have_count(number)
        tab.ready()
    assert tab.answers() == [expected["base"], expected["tuned"]]
    assert tab.page.locator("#chat .arm").all_text_contents() == [demo.ARMS["base"], demo.ARMS["tuned"]]


def test_type_and_length_shape_the_question_and_the_answer(tab: Tab, bot: demo.Bot) -> None:
    tab.page.locator("#qtype input").click()
    tab.page.get_by_role("option", name="treatment").click()
    tab.page.locator("#length input[type=number]").fill("16")
    tab.page.locator("#length input[type=number]").press("Tab")
    tab.ask("gout")
    expect(tab.page.locator("#chat .sources")).to_be_visible()
    expect(tab.page.locator("#chat .user")).to_contain_text("What are the treatments for gout?")
    tab.ready()
    assert tab.answers() == ["".join(script.real(bot.model, bot.tokenizer, "What are the treatments for gout?", 16)).strip()]


def test_a_red_flag_is_on_the_page_before_generation_and_before_the_queue(tab: Tab, server: str, browser: Browser) -> None:
    script.gate.clear()
    flag, answer = tab.page.locator("#chat .flag"), tab.page.locator("#chat .answer")
    tab.ask(CHEST)
    expect(flag).to_contain_text(EMERGENCY)
    expect(answer).to_have_count(0)
    second = Tab(browser, server)  # somebody else, who has to wait for the first answer
    second.ask(CHEST)
    expect(second.page.locator("#chat .flag")).to_contain_text(EMERGENCY)
    expect(second.page.locator("#chat .answer")).to_have_count(0)
    script.gate.set()
    expect(answer).to_have_text("after the gate")
    expect(second.page.locator("#chat .answer")).to_have_text("after the gate")
    expect(flag).to_be_visible()
    above = [flag.bounding_box(), answer.bounding_box()]
    assert above[0] and above[1] and above[0]["y"] < above[1]["y"]
    second.context.close()


def test_what_a_person_or_the_model_writes_is_text(tab: Tab, server: str) -> None:
    asked = f"markup: {NASTY} <b>bold</b> <img src=http://192.0.2.1/b.png onerror=hacked=1>"
    tab.ask(asked)
    tab.ready()
    expect(tab.page.locator("#chat .answer")).to_have_count(1)
    written = "".join(script.pieces("markup") or ()).strip()
    assert tab.answers() == [written]
    assert tab.page.locator("#chat .question").all_text_contents() == [tidy_question(asked)]
    assert tab.page.locator("#chat :is(script, svg[onload], b, em, h1, [onerror], .katex)").count() == 0
    assert tab.page.locator("#chat .message img").count() == 0
    assert tab.page.evaluate("typeof hacked") == "undefined"
    assert [url for url in tab.requests if not url.startswith((server, "data:", "blob:"))] == []
    assert tab.said == []


def test_the_page_may_load_from_its_own_server_only(tab: Tab, server: str) -> None:
    """The second wall: should markup get through all the same, the browser does not follow it."""
    tab.page.evaluate("() => { const i = new Image(); i.src = 'http://127.0.0.2:9/x.png'; document.body.append(i); }")
    tab.page.wait_for_function("() => [...document.images].every(i => i.complete)")
    assert any("Content Security Policy" in text for text in tab.said)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("why " * 25_000, f"The question has 100,000 characters: at most {demo.MOST_CHARACTERS:,}"),
        ("   ", demo.EMPTY),
        ("a b c d " * 240, "The question is too long: with its answer"),
    ],
    ids=["100,000 characters", "empty", "more tokens than the model reads"],
)
def test_a_question_that_cannot_be_asked_is_answered_by_the_reason(tab: Tab, question: str, said: str) -> None:
    tab.ask(question)
    expect(tab.page.locator("#chat .problem")).to_contain_text(said)
    tab.ready()
    assert len(tab.page.locator("#chat").inner_text()) < 3 * demo.MOST_CHARACTERS
    tab.ask("echo still here")
    expect(tab.page.locator("#chat .answer")).to_have_text("You asked: echo still here")


def test_a_failure_in_mid_stream_is_said_in_the_chat_and_the_server_goes_on(tab: Tab, capfd: pytest.CaptureFixture[str]) -> None:
    tab.ask("it breaks")
    expect(tab.page.locator("#chat .problem")).to_have_text(demo.BROKE_OFF)
    assert tab.answers() == ["So far"]
    assert "secret" not in tab.page.content()
    tab.ready()
    tab.ask("echo still here")
    expect(tab.page.locator("#chat .answer").nth(1)).to_have_text("You asked: echo still here")
    assert "medquad: an answer failed: RuntimeError: no memory left in /secret/place\n" in capfd.readouterr().err


def test_nothing_scrolls_sideways_on_a_phone_and_the_notice_stays_in_view(browser: Browser, server: str) -> None:
    phone = Tab(browser, server, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    widths = "() => [document.documentElement.scrollWidth, window.innerWidth]"
    phone.ask(f"echo {'x' * 300}")
    expect(phone.page.locator("#chat .answer")).to_contain_text("x" * 300)
    phone.ready()
    for scheme in ("light", "dark"):
        phone.page.emulate_media(color_scheme=scheme)
        needed, there = phone.page.evaluate(widths)
        assert (needed, there) == (360, 360)
        for part in ("#chat .message", "#chat .sources"):
            assert (
                phone.page.evaluate(f"() => Math.max(...[...document.querySelectorAll('{part}')].map(e => e.scrollWidth - e.clientWidth))")
                <= 1
            )
    expect(phone.page.locator("#notice p")).to_be_in_viewport(ratio=0.99)
    expect(phone.box).to_be_in_viewport(ratio=0.99)
    phone.context.close()


def test_everything_can_be_done_from_the_keyboard(tab: Tab) -> None:
    focused = "() => { const e = document.activeElement; return e.getAttribute('aria-label') || e.placeholder || e.value || e.innerText }"

    def reach(name: str, key: str) -> None:
        for _ in range(25):
            if name in str(tab.page.evaluate(focused)):
                return
            tab.page.keyboard.press(key)
        raise AssertionError(f"{name} is not reached by {key}")

    expect(tab.box).to_be_focused()  # as soon as the page is there
    reach(THREE_QUESTIONS[0], "Shift+Tab")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#chat .sources")).to_have_count(1)
    tab.ready()
    for _ in range(25):  # in Gradio each choice has a tab stop of its own
        if tab.page.evaluate("() => document.activeElement.matches('input[type=radio][value=base]')"):
            break
        tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("Space")
    expect(tab.page.get_by_role("radio", name=demo.ARMS["base"])).to_be_checked()
    reach("Ask about a disease", "Shift+Tab")
    tab.page.keyboard.type("say it slowly")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#chat .answer").nth(1)).to_contain_text("word3 ")
    reach("Stop", "Tab")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#chat .problem")).to_have_text(demo.STOPPED)
    expect(tab.page.locator("#chat .arm").nth(1)).to_have_text(demo.ARMS["base"])


# ---- over plain HTTP ------------------------------------------------------------------------------------------------


class User:
    """A page without a browser: what Gradio's page sends, and what it gets."""

    def __init__(self, address: str, name: str) -> None:
        self.client = httpx.Client(base_url=address, timeout=120, trust_env=False)
        self.name = name
        functions = self.client.get("config").json()["dependencies"]
        named = {found["api_name"]: found["id"] for found in reversed(functions) if found["api_name"]}
        self.ask_id, self.answer_id = named["ask"], named["answer"]

    def body(self, function: int, data: list[Any]) -> dict[str, Any]:
        return {"fn_index": function, "data": data, "session_hash": self.name, "event_data": None, "trigger_id": None}

    def ask(self, question: str) -> httpx.Response:
        """Put the question into the chat, then into the queue."""
        put = self.client.post("gradio_api/run/predict", json=self.body(self.ask_id, [question, None, "", "tuned", 64]))
        assert put.status_code == 200, put.text
        return self.client.post("gradio_api/queue/join", json=self.body(self.answer_id, [None]))

    def answer(self) -> str:
        """Read the stream of events to its end; the last reply in the chat."""
        with self.client.stream("GET", "gradio_api/queue/data", params={"session_hash": self.name}) as events:
            for line in events.iter_lines():
                message = json.loads(line[6:]) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return json.dumps(message["output"])
        raise AssertionError("the stream ended without an answer")


def test_twenty_users_at_once_get_each_their_own_answer_one_after_another(server: str) -> None:
    script.most = 0

    def one(number: int) -> str:
        user = User(server, f"user{number}")
        assert user.ask(f"echo from user {number}.").status_code == 200
        return user.answer()

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    for number, answer in enumerate(answers):
        assert re.findall(r"You asked: echo from user (\d+)\.", answer)[-1:] == [str(number)]
        assert set(re.findall(r"from user (\d+)\.", answer)) == {str(number)}
    assert script.most == 1, "one answer is generated at a time"


def test_a_full_queue_refuses_and_a_second_question_of_one_page_waits_its_turn(server: str) -> None:
    script.gate.clear()
    try:
        replies = [User(server, f"crowd{n}").ask(CHEST).status_code for n in range(demo.MOST_WAITING + 3)]
        first = User(server, "crowd0")
        again = first.client.post("gradio_api/run/predict", json=first.body(first.ask_id, ["another", None, "", "tuned", 64]))
    finally:
        script.gate.set()
    assert replies[:20] == [200] * 20
    assert replies[-1] == 503
    assert again.status_code == 500 and "One question at a time" in again.text
    patient = User(server, "patient")
    while patient.ask("echo at last").status_code == 503:
        time.sleep(0.2)
        patient = User(server, f"patient{time.monotonic()}")
    assert "You asked: echo at last" in patient.answer()


def test_there_is_no_way_around_the_page(server: str) -> None:
    user = User(server, "curious")
    direct = user.client.post("gradio_api/run/predict", json=user.body(user.answer_id, [None]))
    assert direct.status_code == 404, "no answer without the queue"
    assert user.client.get("gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    for path in ("docs", "redoc", "openapi.json", "gradio_api/runs"):
        assert user.client.get(path).status_code == 404, path
    for path in ("monitoring", "monitoring/summary"):
        assert user.client.get(path).status_code == 403, path
    assert user.client.post("gradio_api/queue/join", content=b"x" * (demo.MOST_BYTES + 1)).status_code == 413
    assert user.client.post("gradio_api/queue/join", content=iter([b"x"])).status_code == 413, "a body of unknown length"
    assert user.client.post("gradio_api/upload", files={"files": b"more than a byte"}).status_code == 413
    config = user.client.get("config").json()
    assert (config["analytics_enabled"], config["footer_links"]) == (False, [])


def test_the_length_that_a_client_sends_is_bounded(bot: demo.Bot, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(generation, "stream", lambda model, tokenizer, question, most: asked.append(most) or (x for x in "a"))
    for most in (10**9, 40, -5):
        assert list(bot.stream("x", "tuned", most)) == ["a"]
    assert asked == [bot.plan.max_new_tokens, 40, 1]


# ---- without a server -----------------------------------------------------------------------------------------------


def test_the_types_of_question_are_the_ones_that_the_rows_have() -> None:
    rows = sample.rows()
    assert {row["qtype"] for row in rows} == set(demo.QTYPES) - {""}
    for row in rows:
        asked = demo.phrase(row["focus"], row["qtype"])
        assert asked.lower() == tidy_question(row["question"]).lower()
        assert demo.phrase(row["question"], "outlook").lower() == f"what is the outlook for {row['focus']}?".lower()


@pytest.mark.parametrize(
    ("text", "qtype", "asked"),
    [
        ("gout", "", "gout"),
        ("gout ", "causes", "What causes gout?"),
        ("gout?", "inheritance", "gout?"),
        ("Who is at risk for Gout? ?", "causes", "What causes Gout?"),
        ("Does tea help against gout?", "causes", "Does tea help against gout?"),
        ("  ", "causes", "  "),
        ("?", "causes", "?"),
    ],
)
def test_a_type_makes_a_question_of_a_name_and_leaves_other_questions_alone(text: str, qtype: str, asked: str) -> None:
    assert demo.phrase(text, qtype) == asked


def test_the_eleventh_question_of_a_minute_has_to_wait(bot: demo.Bot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RATE", (10, 60.0))  # the server of this file allows more
    clock = itertools.count(100.0)
    monkeypatch.setattr(demo, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))  # the server's threads keep the real one
    chat = demo.Chat()
    for _ in range(10):
        chat = chat.asked(bot, ASTHMA, "", "tuned", 64)
    assert {turn.problem for turn in chat.turns} == {""}
    assert chat.asked(bot, ASTHMA, "", "tuned", 64).turns[-1].problem == demo.TOO_FAST
    clock = itertools.count(160.5)  # the first question is a minute old, the others are not
    chat = chat.asked(bot, ASTHMA, "", "tuned", 64)
    assert chat.turns[-1].problem == ""
    assert chat.asked(bot, ASTHMA, "", "tuned", 64).turns[-1].problem == ""  # 161.5: the second is a minute old, too
    clock = itertools.count(161.6)
    for _ in range(30):
        chat = chat.asked(bot, ASTHMA, "", "tuned", 64)
    assert len(chat.turns) == demo.MOST_TURNS


def row(**changes: Any) -> dict[str, Any]:
    return {**sample.rows()[0], **changes}


def test_sources_are_named_with_their_page_and_age_and_no_text_of_theirs_becomes_markup() -> None:
    close = Hit(row(focus="<b>Gout</b>", source="NIDDK", url="https://www.niddk.nih.gov/gout?a=1&b=2"), 0.9)
    evil = Hit(row(focus=NASTY, source="<i>x</i>", url="javascript:alert(1)"), 0.8)
    turn = demo.Turn("<u>q</u>", answer=NASTY, hits=(close, evil), supports=(Support("a", 0.9, close, "a"), Support("b", 0.1, None, "")))
    found = Markup(turn.markup)
    assert found.tags <= {"p", "div", "strong", "ol", "li", "a"}
    assert re.findall(r'href="([^"]*)"', turn.markup) == ["https://www.niddk.nih.gov/gout?a=1&amp;b=2"]
    for text in (
        "<b>Gout</b>: information · NIDDK · https://www.niddk.nih.gov/gout?a=1&b=2",
        ARCHIVED,
        NASTY,
        "javascript:alert(1)",
        "a close passage: 1 of 2",
    ):
        assert text in found.text
    nothing = Markup(replace(turn, hits=(), supports=()).markup).text
    assert NO_SOURCE in nothing.lower() and "NIDDK" not in nothing
    assert Markup(demo.Chat((turn,)).messages[0]["content"]).text == "<u>q</u>"


def test_a_refused_question_is_not_asked_and_an_unfinished_one_says_so(bot: demo.Bot) -> None:
    chat = demo.Chat().asked(bot, "", "", "tuned", 64)
    assert list(chat.answered(bot)) == [] and chat.ended() == chat
    assert list(demo.Chat().answered(bot)) == [] and demo.Chat().ended() == demo.Chat()
    waiting = demo.Chat().asked(bot, CHEST, "", "base", 64)
    assert waiting.turns[0].flag == red_flag(CHEST) is not None
    assert waiting.ended().turns[0].problem == demo.UNANSWERED
    assert waiting.last(answer="So").ended().turns[0].problem == demo.STOPPED


def test_closing_the_demo_ends_the_answer_that_is_being_given(bot: demo.Bot) -> None:
    own = replace(bot, closing=Event(), free=Lock())
    pieces = own.stream(ASTHMA, "base", 64)
    next(pieces)
    own.closing.set()
    assert list(pieces) == []
    assert own.free.acquire(blocking=False)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_clear_message(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["demo", "--profile", "tiny", "--port", str(port)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"medquad: port {port} of 127.0.0.1 cannot be had (Address already in use).")
    assert f"--port {port + 1}" in line
    assert cli.main(["demo", "--profile", "tiny", "--port", "99999"]) == 1
    assert "port 99999" in capsys.readouterr().err


def test_a_demo_before_training_names_the_lesson_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--profile", "tiny", "--runs", str(tmp_path), "--port", str(free_port())]) == 1
    assert "medquad run --profile tiny --only 04" in capsys.readouterr().err


def test_ctrl_c_stops_the_command_in_the_middle_of_an_answer(tiny_adapter: Path, tmp_path: Path) -> None:
    """A process of its own, behind a proxy that is not there: this machine is not asked for through it."""
    shutil.copytree(tiny_adapter, tmp_path / "tiny" / "adapter")
    environment = {k: v for k, v in os.environ.items() if k.upper() not in ("NO_PROXY", "GRADIO_SERVER_NAME")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO), "HTTP_PROXY": "http://127.0.0.1:9", "GRADIO_SHARE": "True"}
    port = free_port()
    command = [sys.executable, "-m", "medquad_utils.cli", "demo", "--profile", "tiny", "--runs", str(tmp_path), "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == f"The demo runs at http://127.0.0.1:{port}/ (Ctrl-C stops it).\n", process.stderr.read()
        assert User(f"http://127.0.0.1:{port}/", "last").ask(ASTHMA).status_code == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "\nThe demo has stopped.\n")
    assert "Traceback" not in err, err
    demo.check_port("127.0.0.1", port)


# ---- a Space --------------------------------------------------------------------------------------------------------


def test_a_space_is_three_text_files_with_the_tested_versions_and_its_app_runs(
    tmp_path: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "space"
    assert cli.main(["demo", "--profile", "tiny", "--space", str(folder), "--repo", "me/chat"]) == 0
    assert cli.main(["demo", "--profile", "tiny", "--space", str(folder), "--repo", "me/chat"]) == 0, "written anew"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "app.py", "requirements.txt"]
    lines = (folder / "requirements.txt").read_text().splitlines()
    (pip,) = [part["pip"] for part in yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"] if isinstance(part, dict)]
    assert lines[0].startswith("medquad-qlora @ git+https://github.com/") and set(lines[1:]) <= set(pip) and len(lines) > 10
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(header)
    assert {k: card[k] for k in ("sdk", "app_file", "models", "license")} == {
        "sdk": "gradio", "app_file": "app.py", "models": ["me/chat"], "license": "apache-2.0",
    }  # fmt: skip
    assert f"gradio=={card['sdk_version']}" in lines and NOTICE in text
    served: list[tuple[demo.Bot, str]] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo: {"me/chat": str(tiny_adapter)}[repo])
    monkeypatch.setattr(demo, "serve", lambda bot, host, port: served.append((bot, host)))
    monkeypatch.setenv("MEDQUAD_OUT", str(tmp_path / "runs"))
    runpy.run_path(str(folder / "app.py"), run_name="__main__")
    ((bot, host),) = served
    assert host == "0.0.0.0" and bot.arms == ["tuned", "base"]
    capsys.readouterr()


def test_a_space_of_a_llama_says_what_its_licence_asks(tmp_path: Path) -> None:
    llama = resolve("llama-8b", hardware=Hardware("cuda", "T4", 16.0, (7, 5)))
    demo.write_space(tmp_path / "space", "me/llama-3-medquad", llama)
    text = (tmp_path / "space" / "README.md").read_text()
    assert "license: llama3" in text and "Built with Meta Llama 3" in text and "HF_TOKEN" in text
    assert "Built with Meta Llama 3" in demo._notice(llama)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--space", "space"), "--space DIR and --repo USER/NAME go together"),
        (("--repo", "me/chat"), "--space DIR and --repo USER/NAME go together"),
        (("--space", "space", "--repo", "chat"), "expected USER/NAME"),
        (("--space", "taken", "--repo", "me/chat"), "it holds thesis.txt"),
    ],
)
def test_a_space_that_cannot_be_written_is_refused(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    assert cli.main(["demo", "--profile", "tiny", *arguments]) == 1
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_merged_model_is_shown_without_the_switch(plan: Plan, tmp_path: Path) -> None:
    shutil.copytree(TINY_MODEL, tmp_path / "merged")
    merged = demo.load(plan, tmp_path / "merged")
    assert merged.arms == ["tuned"]
    assert "".join(merged.stream(ASTHMA, "tuned", 16))
    with pytest.raises(CourseError, match="no adapter"):
        demo.load(plan, tmp_path)
