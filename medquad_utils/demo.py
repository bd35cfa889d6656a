"""The demo: a chat with the tuned model in a browser, on this machine, and the folder of a Hugging Face Space that shows the same.

What a person or the model writes is escaped here, and nothing else makes markup: Gradio 6.31 puts the messages of a chat into the page
as HTML, with ``render_markdown=False`` too. Gradio's sanitiser and a Content-Security-Policy stand behind that, as second and third wall:
the page can load from its own server only.
"""

from __future__ import annotations

import html
import importlib.metadata
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from threading import Event, Lock, current_thread, main_thread
from typing import TYPE_CHECKING, Any

from medquad_utils import CourseError, generation
from medquad_utils.arms import adapted
from medquad_utils.chat import NOTICE, THREE_QUESTIONS, tidy_question
from medquad_utils.data import HUB_DATASET
from medquad_utils.explanation import Support, check_question, cite, whole_archive
from medquad_utils.files import whole_folder
from medquad_utils.model_card import licence_of
from medquad_utils.profiles import Plan, resolve
from medquad_utils.publishing import check_name
from medquad_utils.report import EMBEDDED
from medquad_utils.retrieval import NO_SOURCE, Hit, Index
from medquad_utils.safety import Flag, red_flag
from medquad_utils.splits import template_of

if TYPE_CHECKING:
    from gradio import Blocks
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HOST, PORT = "127.0.0.1", 7860
MOST_CHARACTERS = 2_000  # of a question: a longer one is refused before anything else looks at it
MOST_BYTES = 1_000_000  # of any request
MOST_WAITING = 40  # questions in the queue, of everybody; one is answered at a time
MOST_TURNS = 20  # of a conversation: older ones leave the page
RATE = (10, 60.0)  # questions of one page, in so many seconds
SHORTEST = 16  # tokens that the length control goes down to

ARMS = {"tuned": "after training (tuned)", "base": "before training (base)"}
# MedQuAD's commonest types of question, and how it asks them; "" leaves a question as it was typed.
QTYPES = {
    "": "{}",
    "information": "What is (are) {}?",
    "symptoms": "What are the symptoms of {}?",
    "causes": "What causes {}?",
    "treatment": "What are the treatments for {}?",
    "outlook": "What is the outlook for {}?",
    "exams and tests": "How to diagnose {}?",
    "susceptibility": "Who is at risk for {}?",
    "prevention": "How to prevent {}?",
    "inheritance": "Is {} inherited?",
}
EMPTY = "The question is empty: type one, or take one of the three."
TOO_FAST = f"At most {RATE[0]} questions in {RATE[1]:.0f} seconds: wait a little, then ask again."
BROKE_OFF = "The answer broke off here: the model failed. Ask again; if it fails again, look at the terminal where the demo was started."
STOPPED = "Stopped before the end."
UNANSWERED = "No answer: it was stopped, or too many people are waiting. Ask again."


def phrase(text: str, qtype: str) -> str:
    """The question to ask: MedQuAD's question of ``qtype`` about the disease that ``text`` is or, in one of MedQuAD's forms, asks about.

    A question of another form says itself what it wants, and stays as it is, as everything does without a ``qtype``.
    """
    bare = text.strip().rstrip("? ")
    found = template_of(f"{bare} ?") or template_of(f"{bare}? ?")
    if not qtype or not bare or ("?" in text and not found):
        return text
    return QTYPES[qtype].format(found[1] if found else bare)


# ---- the model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bot:
    """A loaded model that answers one question at a time, and the archive in which sources are looked up."""

    plan: Plan
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    index: Index
    closing: Event = field(default_factory=Event)
    free: Lock = field(default_factory=Lock)

    @property
    def arms(self) -> list[str]:
        """Whom one can ask: a merged model has no base inside."""
        return list(ARMS) if hasattr(self.model, "disable_adapter") else ["tuned"]

    def check(self, question: str) -> str:
        """``question`` as it is asked: one line, without control characters.

        Raises:
            CourseError: it is empty or too long.
        """
        if len(question) > MOST_CHARACTERS:
            raise CourseError(
                f"The question has {len(question):,} characters: at most {MOST_CHARACTERS:,} are read. Ask a shorter one."
            )
        if not tidy_question(question):
            raise CourseError(EMPTY)
        context = int(self.model.config.max_position_embeddings)
        return tidy_question(
            check_question(question, self.tokenizer, context, self.plan.max_new_tokens)
        )

    def stream(self, question: str, arm: str, max_new_tokens: int) -> Iterator[str]:
        """Yield the answer of ``arm`` piece by piece; ends early when the iterator or the demo is closed."""
        pieces = generation.stream(
            self.model,
            self.tokenizer,
            question,
            max(1, min(max_new_tokens, self.plan.max_new_tokens)),
        )
        with self.free, adapted(self.model, arm):
            try:
                for piece in pieces:
                    if self.closing.is_set():
                        return
                    yield piece
            finally:
                pieces.close()  # type: ignore[attr-defined]


def load(plan: Plan, adapter: Path | None = None) -> Bot:
    """The tuned model of the plan with its tokenizer and archive; ``adapter`` may also be the folder of a merged model.

    Raises:
        CourseError: what ``generation.load_tuned`` and ``explanation.whole_archive`` raise.
    """
    folder = adapter or plan.folder / "adapter"
    if (folder / "config.json").is_file():  # a whole model, as medquad publish makes one of tiny
        plan = replace(plan, model_path=str(folder))
        model = generation.load_base(plan, quantized=plan.device == "cuda")
    else:
        generation.check_adapter(plan, folder)
        model = generation.load_tuned(plan, folder)
    return Bot(plan, model, generation.load_tokenizer(plan), whole_archive(plan, folder))


# ---- what was said, and how it looks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One question and what came of it; ``problem`` says why there is no answer, or no whole one."""

    question: str
    arm: str = "tuned"
    max_new_tokens: int = 0
    flag: Flag | None = None
    answer: str = ""
    hits: tuple[Hit, ...] | None = None  # None: not looked up yet
    supports: tuple[Support, ...] = ()
    problem: str = ""

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.hits is not None or bool(self.problem)

    @property
    def markup(self) -> str:
        """The reply as HTML; every text in it is escaped."""
        parts = [_flagged(self.flag)] if self.flag else []
        if self.answer or self.hits is not None:
            answer = html.escape(self.answer or "(the model said nothing)")
            parts += [f'<p class="arm">{ARMS[self.arm]}</p>', f'<p class="answer">{answer}</p>']
        if self.problem:
            parts.append(f'<p class="problem">{html.escape(self.problem)}</p>')
        if self.hits is not None:
            parts.append(_sources(self.hits, self.supports))
        return "".join(parts)


def _flagged(flag: Flag) -> str:
    return f'<div class="flag"><strong>Stop: {html.escape(flag.kind)}?</strong> {html.escape(flag.message)}</div>'


def _sources(hits: Sequence[Hit], supports: Sequence[Support]) -> str:
    if not hits:
        return f'<p class="sources">{html.escape(NO_SOURCE[0].upper() + NO_SOURCE[1:])}.</p>'
    close = sum(support.hit is not None for support in supports)
    about = f"Looked up after the answer, which was given without them. Sentences with a close passage: {close} of {len(supports)}."
    return f'<div class="sources"><strong>Sources</strong><ol>{"".join(map(_source, hits))}</ol><p>{about}</p></div>'


def _source(hit: Hit) -> str:
    title, url = (
        html.escape(f"{hit.title}: {hit.row['qtype']}" if hit.row["qtype"] else hit.title),
        hit.url or "",
    )
    if url.startswith(("https://", "http://")):
        title = (
            f'<a href="{html.escape(url)}" target="_blank" rel="noopener noreferrer">{title}</a>'
        )
    return f"<li>{' · '.join([title, *(html.escape(text) for text in (hit.source, url, hit.note) if text)])}</li>"


@dataclass(frozen=True)
class Chat:
    """What one page has asked so far, and when (seconds of the monotonic clock)."""

    turns: tuple[Turn, ...] = ()
    times: tuple[float, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as Gradio's chat takes it."""
        found = []
        for turn in self.turns:
            found.append(
                {"role": "user", "content": f'<p class="question">{html.escape(turn.question)}</p>'}
            )
            if turn.markup:
                found.append({"role": "assistant", "content": turn.markup})
        return found

    def asked(self, bot: Bot, text: str, qtype: str, arm: str, max_new_tokens: int) -> Chat:
        """The chat with one more turn: ready to be answered, or with the reason why it will not be."""
        most, seconds = RATE
        now = time.monotonic()
        times = tuple(moment for moment in self.times if now - moment < seconds)
        try:
            if len(times) >= most:
                raise CourseError(TOO_FAST)
            bot.check(text)
            turn = Turn(bot.check(phrase(text, qtype)), arm, max_new_tokens, red_flag(text))
        except CourseError as error:
            turn = Turn(
                text if len(text) <= 200 else f"{text[:200]} …",
                problem=str(error)[0].upper() + str(error)[1:],
            )
        return Chat((*self.turns, turn)[-MOST_TURNS:], (*times, now)[-most:])

    def last(self, **changes: Any) -> Chat:
        """The chat with another last turn."""
        return replace(self, turns=(*self.turns[:-1], replace(self.turns[-1], **changes)))

    def answered(self, bot: Bot) -> Iterator[Chat]:
        """The chat again and again while its last question is answered; a failure ends in a message, not in an exception."""
        if not self.turns or self.turns[-1].done:
            return
        turn, text = self.turns[-1], ""
        try:
            for piece in bot.stream(turn.question, turn.arm, turn.max_new_tokens):
                text += piece
                yield self.last(answer=text.strip())
            hits, supports = cite(bot.index, turn.question, text)
            yield self.last(answer=text.strip(), hits=tuple(hits), supports=tuple(supports))
        except Exception as error:  # whatever a model can raise: the server goes on
            print(f"medquad: an answer failed: {type(error).__name__}: {error}", file=sys.stderr)
            yield self.last(answer=text.strip(), problem=BROKE_OFF)

    def ended(self) -> Chat:
        """The chat after its last question was stopped, refused by the queue, or answered to the end."""
        if not self.turns or self.turns[-1].done:
            return self
        return self.last(problem=STOPPED if self.turns[-1].answer else UNANSWERED)


# ---- the page -------------------------------------------------------------------------------------------------------

STYLE = """
.gradio-container main { max-width: 72rem !important; padding: .75rem .75rem 5rem !important }
#head h1 { font-size: 1.35rem; margin: 0 } #head p { margin: .1rem 0 0; color: var(--body-text-color-subdued) }
#chat { height: calc(100dvh - 16rem) !important; min-height: 16rem !important }
#chat p { margin: 0; overflow-wrap: anywhere } #chat .answer, #chat .question { white-space: pre-wrap }
#chat .arm { font-size: .8rem; color: var(--body-text-color-subdued) }
#chat .flag { border: 2px solid #b3261e; border-radius: .4rem; background: #fdecea; color: #410e0b; padding: .6rem .8rem }
#chat .flag + p { margin-top: .6rem }
#chat .problem { border-left: 4px solid #d55e00; padding-left: .6rem }
#chat .sources { font-size: .85rem; margin-top: .5rem; border-top: 1px solid var(--border-color-primary); overflow-wrap: anywhere }
#chat .sources ol { margin: .2rem 0 .4rem; padding-left: 1.4rem; list-style: decimal }
#notice { position: fixed; inset: auto 0 0 0; z-index: 1000 }
#notice, #notice > *, #notice p { background: var(--body-background-fill) !important }
#notice p { max-width: 70rem; margin: .5rem auto; padding: 0 .75rem; border-left: 4px solid #d55e00; font-size: .8rem; line-height: 1.35 }
.dark #chat .flag { background: #5c1a16; color: #ffdad6; border-color: #f2b8b5 }
@media (max-width: 48rem) {
  .gradio-container main { padding-bottom: 8rem !important }
  #chat { height: calc(100dvh - 22rem) !important } #chat .bubble-wrap { padding: .5rem !important }
}
"""
# Nothing but this server is asked for anything. Gradio's page runs inline scripts, and compiles its templates.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'"
)


def page(bot: Bot) -> Blocks:
    """The chat as a Gradio app, not started yet."""
    gradio = _gradio()
    with gradio.Blocks(title="Ask the tuned model", analytics_enabled=False) as app:
        gradio.HTML(_head(bot.plan), elem_id="head")
        state = gradio.State(Chat())
        with gradio.Row():
            with gradio.Column(scale=3, min_width=320):
                talk = gradio.Chatbot(
                    elem_id="chat", show_label=False, render_markdown=False, sanitize_html=True, allow_tags=False, latex_delimiters=[],
                    buttons=[], feedback_options=None, examples=[{"text": question} for question in THREE_QUESTIONS],
                    allow_file_downloads=False, layout="bubble", placeholder="Ask about a disease, or begin with one of these.",
                )  # fmt: skip
                box = gradio.Textbox(
                    label="Your question",
                    show_label=False,
                    placeholder="Ask about a disease",
                    submit_btn="Ask",
                    autofocus=True,
                    max_lines=4,
                )
            with gradio.Column(scale=1, min_width=240):
                arm = gradio.Radio(
                    [(ARMS[name], name) for name in bot.arms], value="tuned", label="Who answers"
                )
                kinds = [(name or "as typed", name) for name in QTYPES]
                qtype = gradio.Dropdown(
                    kinds,
                    value="",
                    label="Type of question",
                    elem_id="qtype",
                    info="Makes one of MedQuAD's questions of a disease's name.",
                )
                most = bot.plan.max_new_tokens
                length = gradio.Slider(
                    SHORTEST,
                    most,
                    value=most,
                    step=8,
                    label="Length",
                    elem_id="length",
                    info="Tokens of an answer, at most.",
                )
        gradio.HTML(_notice(bot.plan), elem_id="notice")
        _wire(gradio, bot, state, talk, box, [qtype, arm, length])
    app.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    return app


def _wire(gradio: Any, bot: Bot, state: Any, talk: Any, box: Any, controls: Sequence[Any]) -> None:
    """Who calls what. A red flag is on the page before its question so much as waits in the queue."""

    def ask(text: str, chat: Chat, *controls: Any) -> tuple[Any, Chat, Any]:
        if chat.turns and not chat.turns[-1].done:
            raise gradio.Error(
                "One question at a time: wait for the answer, or stop it.", print_exception=False
            )
        chat = chat.asked(bot, text, *controls)
        return gradio.Textbox("", submit_btn=False, stop_btn="Stop"), chat, chat.messages

    def pick(event: Any, chat: Chat, *controls: Any) -> tuple[Any, Chat, Any]:
        return ask(event.value["text"], chat, *controls)

    pick.__annotations__["event"] = gradio.SelectData  # how Gradio knows what to pass

    def answer(chat: Chat) -> Iterator[tuple[Chat, Any]]:
        for grown in chat.answered(bot):
            yield grown, grown.messages

    def end(chat: Chat) -> tuple[Any, Chat, Any]:
        chat = chat.ended()
        return gradio.Textbox(submit_btn="Ask", stop_btn=False), chat, chat.messages

    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    asked = box.submit(ask, [box, state, *controls], [box, state, talk], **quiet)
    picked = talk.example_select(pick, [state, *controls], [box, state, talk], **quiet)
    answered = []
    for event in (asked, picked):
        answered.append(
            event.success(
                answer, state, [state, talk], show_progress="minimal", api_visibility="private"
            )
        )
        answered[-1].then(end, state, [box, state, talk], **quiet)
    box.stop(None, cancels=answered, **quiet)
    talk.clear(Chat, None, state, cancels=answered, **quiet)


def _head(plan: Plan) -> str:
    about = EMBEDDED if plan.model_id == "embedded" else f"{plan.model_id}, tuned on MedQuAD."
    return f"<h1>Ask the tuned model</h1><p>{html.escape(about)} It does not see earlier questions.</p>"


def _notice(plan: Plan) -> str:
    return (
        f"<p>{html.escape(' '.join(filter(None, [NOTICE, licence_of(plan.model_id).built])))}</p>"
    )


@cache
def _gradio() -> Any:
    """Gradio, after it was told to call nobody, and that this machine is not behind the proxy."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_RUN_HISTORY": "False",
    }
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST, "localhost"]))
    import gradio

    return gradio


# ---- the server -----------------------------------------------------------------------------------------------------


class _Guard:
    """ASGI: refuses large requests, and sends the policy with every reply."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        headers = dict(scope["headers"])
        length = headers.get(
            b"content-length", b"0" if b"transfer-encoding" not in headers else b"unknown"
        )
        if not length.isdigit() or int(length) > MOST_BYTES:
            from starlette.responses import PlainTextResponse

            await PlainTextResponse(f"A request may have {MOST_BYTES:,} bytes at most.", 413)(
                scope, receive, guarded
            )
            return
        await self.app(scope, receive, guarded)


def check_port(host: str, port: int) -> None:
    """Refuse a port that cannot be listened on.

    Raises:
        CourseError: the port is in use, or is none of this machine's.
    """
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        advice = f"Stop the other program, or take another port: medquad demo --port {port + 1 if 0 < port < 65535 else PORT}"
        raise CourseError(f"port {port} of {host} cannot be had ({why}). {advice}") from error


@contextmanager
def running(bot: Bot, host: str = HOST, port: int = PORT) -> Iterator[str]:
    """The demo's address while it serves; closed at the end, an answer that is being generated included.

    Raises:
        CourseError: the port is in use.
    """
    check_port(host, port)
    app, gradio = page(bot), _gradio()
    from starlette.middleware import Middleware

    theme = gradio.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",  # Gradio's own are too pale to read
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    )  # fmt: skip
    try:
        app.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, inline=False, quiet=True, prevent_thread_lock=True,
            footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, show_error=True,
            max_file_size=1, state_session_capacity=1000, theme=theme, css=STYLE,
            app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None, "middleware": [Middleware(_Guard)]},
        )  # fmt: skip
        yield str(app.local_url)
    finally:
        bot.closing.set()
        app.close(verbose=False)
        if bot.free.acquire(timeout=10):  # the last answer has ended
            bot.free.release()


def serve(bot: Bot, host: str = HOST, port: int = PORT) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        CourseError: the port is in use.
    """
    if current_thread() is main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running(bot, host, port) as address:
            print(f"The demo runs at {address} (Ctrl-C stops it).", flush=True)
            if host not in (HOST, "localhost", "::1"):
                print("Whoever reaches this machine can use it: there is no password.", flush=True)
            while True:
                time.sleep(1)
    except KeyboardInterrupt:
        print("\nThe demo has stopped.", flush=True)


# ---- a Space --------------------------------------------------------------------------------------------------------

PACKAGES = (  # what the demo loads, pinned in a Space to what is installed here
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "scikit-learn", "scipy", "matplotlib", "bm25s", "captum",
    "gradio",
)  # fmt: skip
SPACE_FILES = ("app.py", "requirements.txt", "README.md")
COURSE = "https://github.com/medquad-qlora/medquad-qlora"


def serve_space(repo: str, profile: str) -> None:
    """What a Space's app.py calls: fetch the published ``repo`` from the Hub and serve it to everybody.

    Raises:
        CourseError: what ``load`` raises.
    """
    from huggingface_hub import snapshot_download

    serve(
        load(resolve(profile), Path(snapshot_download(repo))),
        "0.0.0.0",
        int(os.environ.get("GRADIO_SERVER_PORT", PORT)),
    )


def write_space(folder: Path, repo: str, plan: Plan) -> Path:
    """Write a folder that is ready to be a Space showing the published ``repo``: three text files, no weights; whole or not at all.

    Raises:
        CourseError: ``repo`` is no name that ``publishing.check_name`` accepts, ``folder`` holds something else, or the disk is full.
    """
    check_name(repo, plan.model_id)
    if folder.exists() and (
        strange := [p.name for p in folder.iterdir() if p.name not in SPACE_FILES]
        if folder.is_dir()
        else [folder.name]
    ):
        raise CourseError(f"--space {folder.name}: it holds {min(strange)}. Choose another folder.")
    try:
        with whole_folder(folder) as fresh:
            fresh.mkdir()
            for name, text in zip(
                SPACE_FILES,
                (_app(repo, plan), _requirements(), _space_card(repo, plan)),
                strict=True,
            ):
                (fresh / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CourseError(
            f"cannot write {folder.name}/: {error.strerror or error}. Nothing was changed; free some space."
        ) from error
    return folder


def _app(repo: str, plan: Plan) -> str:
    about = '"""The chat of the QLoRA course as a Space; what it does stands in medquad_utils/demo.py."""'
    return f'{about}\n\nfrom medquad_utils import demo\n\nif __name__ == "__main__":\n    demo.serve_space({repo!r}, {plan.profile!r})\n'


def _requirements() -> str:
    pins = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in PACKAGES]
    return "\n".join([f"medquad-qlora @ git+{COURSE}", *pins]) + "\n"


def _space_card(repo: str, plan: Plan) -> str:
    from huggingface_hub import SpaceCardData

    licence = licence_of(plan.model_id)
    data = SpaceCardData(
        title=repo.split("/")[1], emoji="💬", colorFrom="blue", colorTo="gray", sdk="gradio",
        sdk_version=importlib.metadata.version("gradio"), python_version="3.11", app_file="app.py", license=licence.id, models=[repo],
        datasets=[HUB_DATASET], suggested_hardware="t4-small" if "llama" in plan.profile else "cpu-basic", pinned=False,
    )  # fmt: skip
    gated = (
        f"Its base, {plan.model_id}, is gated: give the Space a secret HF_TOKEN that may read it."
        if licence.agreement
        else ""
    )
    text = [
        f"# {repo}: the demo",
        NOTICE,
        licence.built,
        gated,
        f"Made with {COURSE} (`medquad demo --space`).",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, text)) + "\n"
