"""Chat with the tuned model in a browser, on this machine or in a Hugging Face Space.

The text of a person, the model or a source is escaped here (``demo.html.jinja``), because Gradio
6.31 puts chat messages into the page as HTML, with ``render_markdown=False`` too. Two more layers
stand behind that: Gradio's sanitiser, and a Content-Security-Policy.

Gradio's ``ChatInterface`` would be shorter. It adds the user's text unescaped, runs example
questions through the queue before a notice can appear, and shows no reason for a stopped answer.
"""

from __future__ import annotations

import html
import importlib.metadata
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from threading import Event, Lock, current_thread, main_thread
from typing import TYPE_CHECKING, Any

from medquad_utils import CourseError, generation
from medquad_utils.chat import NOTICE, THREE_QUESTIONS, tidy_question
from medquad_utils.data import HUB_DATASET
from medquad_utils.evaluation import adapted, check_question, whole_archive
from medquad_utils.files import whole_folder
from medquad_utils.profiles import Plan, resolve
from medquad_utils.publishing import check_name, licence_of
from medquad_utils.report import EMBEDDED
from medquad_utils.retrieval import NO_SOURCE, Hit, Index, Support, cite
from medquad_utils.safety import Flag, red_flag
from medquad_utils.splits import template_of

if TYPE_CHECKING:
    from gradio import Blocks
    from jinja2 import Environment
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(__file__).parent / "assets"
COURSE = "https://github.com/medquad-qlora/medquad-qlora"
HOST, PORT = "127.0.0.1", 7860
MAX_CHARACTERS = 2_000  # of a question; a longer one is refused before anything reads it
MAX_BYTES = 1_000_000  # of a request
MAX_WAITING = 40  # questions in the queue of all pages; one is answered at a time
MAX_TURNS = 20  # of a conversation; older ones leave the page
RATE = (10, 60.0)  # questions of one page, in so many seconds

VARIANTS = {"tuned": "after training (tuned)", "base": "before training (base)"}
# MedQuAD's most frequent question types and their wording; "" leaves the question as typed.
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
BROKEN_OFF = (
    "The answer broke off here: the model failed. Ask again. "
    "If it fails again, look at the terminal where the demo was started."
)
STOPPED = "Stopped before the end."
UNANSWERED = "No answer: it was stopped, or too many people are waiting. Ask again."


def phrase(text: str, qtype: str) -> str:
    """Word a disease, or a question in one of MedQuAD's forms, as MedQuAD's question of ``qtype``.

    Other questions stay as they are.
    """
    bare = text.strip().rstrip("? ")
    match = template_of(f"{bare} ?") or template_of(f"{bare}? ?")
    if not qtype or not bare or ("?" in text and not match):
        return text
    return QTYPES[qtype].format(match[1] if match else bare)


@cache
def _templates() -> Environment:
    import jinja2

    escape = jinja2.select_autoescape(["html.jinja"])
    loader = jinja2.FileSystemLoader(ASSETS)
    return jinja2.Environment(
        loader=loader, autoescape=escape, trim_blocks=True, keep_trailing_newline=True
    )


# ---- the model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bot:
    """A loaded model that answers one question at a time, and the index of its sources."""

    plan: Plan
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    index: Index
    closing: Event = field(default_factory=Event)
    free: Lock = field(default_factory=Lock)

    @property
    def variants(self) -> list[str]:
        """List which models can answer: a merged model cannot take its adapter off."""
        return list(VARIANTS) if hasattr(self.model, "disable_adapter") else ["tuned"]

    def check(self, question: str) -> str:
        """Return the question as one line without control characters, if it can be asked."""
        if len(question) > MAX_CHARACTERS:
            raise CourseError(
                f"The question has {len(question):,} characters: at most {MAX_CHARACTERS:,} are "
                "read. Ask a shorter one."
            )
        if not tidy_question(question):
            raise CourseError(EMPTY)
        context = int(self.model.config.max_position_embeddings)
        limit = self.plan.max_new_tokens
        return tidy_question(check_question(question, self.tokenizer, context, limit))

    def stream(self, question: str, variant: str, max_new_tokens: int) -> Iterator[str]:
        """Yield the answer piece by piece; end early when the iterator or the demo is closed."""
        limit = max(1, min(max_new_tokens, self.plan.max_new_tokens))
        pieces = generation.stream(self.model, self.tokenizer, question, limit)
        with self.free, adapted(self.model, variant):
            try:
                for piece in pieces:
                    if self.closing.is_set():
                        return
                    yield piece
            finally:
                pieces.close()  # type: ignore[attr-defined]


def load(plan: Plan, adapter: Path | None = None) -> Bot:
    """Load the tuned model and its archive; ``adapter`` may hold a merged model instead."""
    folder = adapter or plan.folder / "adapter"
    if (folder / "config.json").is_file():  # a whole model, as medquad publish makes one of tiny
        plan = replace(plan, model_path=str(folder))
        model = generation.load_base(plan, quantized=plan.device == "cuda")
    else:
        generation.check_adapter(plan, folder)
        model = generation.load_tuned(plan, folder)
    return Bot(plan, model, generation.load_tokenizer(plan), whole_archive(plan, folder))


# ---- the conversation -----------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """A question and its answer; ``problem`` says why the answer is missing or incomplete."""

    question: str
    variant: str = "tuned"
    max_new_tokens: int = 0
    flag: Flag | None = None
    answer: str = ""
    hits: tuple[Hit, ...] | None = None  # None: not looked up yet
    supports: tuple[Support, ...] = ()
    problem: str = ""

    @property
    def done(self) -> bool:
        """Tell whether nothing more will come."""
        return self.hits is not None or bool(self.problem)

    @property
    def markup(self) -> str:
        """Render the reply as HTML; every text in it is escaped."""
        return _templates().get_template("demo.html.jinja").render(
            turn=self, variant=VARIANTS[self.variant],
            close=sum(support.hit is not None for support in self.supports),
            no_source=NO_SOURCE[0].upper() + NO_SOURCE[1:],
        )  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """The conversation of one page, and the times of its questions (seconds, monotonic clock)."""

    turns: tuple[Turn, ...] = ()
    times: tuple[float, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return the conversation in the form of Gradio's chat component."""
        messages = []
        for turn in self.turns:
            question = f'<p class="question">{html.escape(turn.question)}</p>'
            messages.append({"role": "user", "content": question})
            if turn.markup:
                messages.append({"role": "assistant", "content": turn.markup})
        return messages

    def asked(self, bot: Bot, text: str, qtype: str, variant: str, max_new_tokens: int) -> Chat:
        """Add a turn: ready to be answered, or with the reason why it will not be."""
        limit, seconds = RATE
        now = time.monotonic()
        times = tuple(moment for moment in self.times if now - moment < seconds)
        try:
            if len(times) >= limit:
                raise CourseError(TOO_FAST)
            bot.check(text)
            turn = Turn(bot.check(phrase(text, qtype)), variant, max_new_tokens, red_flag(text))
        except CourseError as error:
            shown = text if len(text) <= 200 else f"{text[:200]} …"
            turn = Turn(shown, problem=str(error)[0].upper() + str(error)[1:])
        return Chat((*self.turns, turn)[-MAX_TURNS:], (*times, now)[-limit:])

    def last(self, **changes: Any) -> Chat:
        """Change fields of the last turn."""
        return replace(self, turns=(*self.turns[:-1], replace(self.turns[-1], **changes)))

    def answered(self, bot: Bot) -> Iterator[Chat]:
        """Yield the chat while its last answer grows; a failure ends in a message, not an error."""
        if not self.turns or self.turns[-1].done:
            return
        turn, text = self.turns[-1], ""
        try:
            for piece in bot.stream(turn.question, turn.variant, turn.max_new_tokens):
                text += piece
                yield self.last(answer=text.strip())
            hits, supports = cite(bot.index, turn.question, text)
            yield self.last(answer=text.strip(), hits=tuple(hits), supports=tuple(supports))
        except Exception as error:  # whatever a model can raise: the server goes on
            print(f"medquad: an answer failed: {type(error).__name__}: {error}", file=sys.stderr)
            yield self.last(answer=text.strip(), problem=BROKEN_OFF)

    def ended(self) -> Chat:
        """Note on the last turn that it was stopped, or refused by the queue, if it is not done."""
        if not self.turns or self.turns[-1].done:
            return self
        return self.last(problem=STOPPED if self.turns[-1].answer else UNANSWERED)


# ---- the page -------------------------------------------------------------------------------


def page(bot: Bot) -> Blocks:
    """Build the chat as a Gradio app; it is not started yet."""
    gradio, limit = _gradio(), bot.plan.max_new_tokens
    about = f"{bot.plan.model_id}, tuned on MedQuAD."
    about = html.escape(EMBEDDED if bot.plan.model_id == "embedded" else about)
    notice = html.escape(f"{NOTICE} {licence_of(bot.plan.model_id).built}".strip())
    with gradio.Blocks(title="Ask the tuned model", analytics_enabled=False) as app:
        head = f"<h1>Ask the tuned model</h1><p>{about} It does not see earlier questions.</p>"
        gradio.HTML(head, elem_id="head")
        with gradio.Row():
            with gradio.Column(scale=3, min_width=320):
                talk = gradio.Chatbot(
                    elem_id="chat", show_label=False, render_markdown=False, sanitize_html=True,
                    allow_tags=False, latex_delimiters=[], buttons=[], feedback_options=None,
                    allow_file_downloads=False, layout="bubble",
                    placeholder="Ask about a disease, or begin with one of these.",
                    examples=[{"text": question} for question in THREE_QUESTIONS],
                )  # fmt: skip
                box = gradio.Textbox(
                    label="Your question", show_label=False, placeholder="Ask about a disease",
                    submit_btn="Ask", autofocus=True, max_lines=4,
                )  # fmt: skip
            with gradio.Column(scale=1, min_width=240):
                variants = [(VARIANTS[name], name) for name in bot.variants]
                variant = gradio.Radio(variants, value="tuned", label="Who answers")
                qtype = gradio.Dropdown(
                    [(name or "as typed", name) for name in QTYPES], value="", elem_id="qtype",
                    label="Type of question", info="Words a disease's name as a MedQuAD question.",
                )  # fmt: skip
                length = gradio.Slider(
                    16, limit, value=limit, step=8, elem_id="length",
                    label="Length", info="Tokens of an answer, at most.",
                )  # fmt: skip
        gradio.HTML(f"<p>{notice}</p>", elem_id="notice")
        _wire(gradio, bot, talk, box, [qtype, variant, length])
    app.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return app


def _wire(gradio: Any, bot: Bot, talk: Any, box: Any, controls: list[Any]) -> None:
    """Connect the events. ``ask`` skips the queue, so an emergency notice appears at once."""
    state = gradio.State(Chat())

    def ask(text: str, chat: Chat, *controls: Any) -> tuple[Any, Chat, Any]:
        if chat.turns and not chat.turns[-1].done:
            waiting = "One question at a time: wait for the answer, or stop it."
            raise gradio.Error(waiting, print_exception=False)
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

    hidden = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
    shown = {"show_progress": "minimal", "api_visibility": "private"}
    answers = []
    for event in (
        box.submit(ask, [box, state, *controls], [box, state, talk], **hidden),
        talk.example_select(pick, [state, *controls], [box, state, talk], **hidden),
    ):
        answers.append(event.success(answer, state, [state, talk], **shown))
        answers[-1].then(end, state, [box, state, talk], **hidden)
    box.stop(None, cancels=answers, **hidden)
    talk.clear(Chat, None, state, cancels=answers, **hidden)


@cache
def _gradio() -> Any:
    """Import Gradio without telemetry, and without a proxy for this machine's own addresses."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST, "localhost"]))
    import gradio

    return gradio


# ---- the server -----------------------------------------------------------------------------

# The page loads from its own server only. Gradio needs inline scripts and compiles its templates.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)


async def _guard(request: Any, call_next: Any) -> Any:
    """Refuse large requests, and send the policy with every reply."""
    from starlette.responses import PlainTextResponse

    default = "unknown" if "transfer-encoding" in request.headers else "0"
    length = request.headers.get("content-length", default)
    if length.isdecimal() and int(length) <= MAX_BYTES:
        response = await call_next(request)
    else:
        response = PlainTextResponse(f"A request may have {MAX_BYTES:,} bytes at most.", 413)
    response.headers["content-security-policy"] = POLICY
    response.headers["referrer-policy"] = "no-referrer"
    return response


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on the port."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        other = port + 1 if 0 < port < 65535 else PORT
        raise CourseError(
            f"cannot listen on port {port} of {host} ({why}). "
            f"Stop the other program, or take another port: medquad demo --port {other}"
        ) from error


@contextmanager
def running(bot: Bot, host: str = HOST, port: int = PORT) -> Iterator[str]:
    """Serve inside the block, which gets the address; at its end stop, unfinished answers too."""
    check_port(host, port)
    app, gradio = page(bot), _gradio()
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware

    # Gradio's own greys are too pale to read.
    theme = gradio.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    )  # fmt: skip
    guard = Middleware(BaseHTTPMiddleware, dispatch=_guard)
    settings = {"docs_url": None, "redoc_url": None, "openapi_url": None, "middleware": [guard]}
    try:
        app.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, inline=False,
            quiet=True, prevent_thread_lock=True, footer_links=[], run_history=False,
            enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, show_error=True,
            max_file_size=1, state_session_capacity=1000, theme=theme,
            css=(ASSETS / "demo.css").read_text(encoding="utf-8"),
            app_kwargs=settings,
        )  # fmt: skip
        yield str(app.local_url)
    finally:
        bot.closing.set()
        app.close(verbose=False)
        if bot.free.acquire(timeout=10):  # the last answer has ended
            bot.free.release()


def serve(bot: Bot, host: str = HOST, port: int = PORT) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    if current_thread() is main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running(bot, host, port) as address:
            print(f"The demo runs at {address} (Ctrl-C stops it).", flush=True)
            if host not in (HOST, "localhost", "::1"):
                print(
                    "Everyone who reaches this machine can use it: there is no password.",
                    flush=True,
                )
            while True:
                time.sleep(1)
    except KeyboardInterrupt:
        print("\nThe demo has stopped.", flush=True)


# ---- a Space --------------------------------------------------------------------------------

SPACE_FILES = ("app.py", "requirements.txt", "README.md")


def serve_space(repo: str, profile: str) -> None:
    """Fetch the published ``repo`` from the Hub and serve it to everybody; app.py calls this."""
    from huggingface_hub import snapshot_download

    bot = load(resolve(profile), Path(snapshot_download(repo)))
    serve(bot, "0.0.0.0", int(os.environ.get("GRADIO_SERVER_PORT", PORT)))


def write_space(folder: Path, repo: str, plan: Plan) -> Path:
    """Write the three files of a Space that shows the published ``repo``, all of them or none."""
    check_name(repo, plan.model_id)
    present = folder.iterdir() if folder.is_dir() else [folder] if folder.exists() else []
    if others := {path.name for path in present} - set(SPACE_FILES):
        raise CourseError(f"--space {folder.name}: it holds {min(others)}. Choose another folder.")
    values = {
        "repo": repo, "plan": plan, "licence": licence_of(plan.model_id), "notice": NOTICE,
        "course": COURSE, "dataset": HUB_DATASET,
        "version": lambda package: importlib.metadata.version(package).partition("+")[0],
    }  # fmt: skip
    try:
        with whole_folder(folder) as fresh:
            fresh.mkdir()
            for name in SPACE_FILES:
                text = _templates().get_template(f"space/{name}.jinja").render(values)
                (fresh / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CourseError(
            f"cannot write {folder.name}/: {error.strerror or error}. Choose another folder."
        ) from error
    return folder
