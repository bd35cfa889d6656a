"""Chat with the tuned model in a browser, on this machine or in a Hugging Face Space.

The text of a person, the model or a source is escaped here (``demo.html.jinja``): Gradio 6.31 puts
chat messages into the page as HTML. Its sanitiser and a Content-Security-Policy stand behind that.
Its shorter ``ChatInterface`` does not escape the user's text, and queues example questions before a
notice can appear.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

import jinja2
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import PlainTextResponse

from medquad_utils import CourseError, generation, machine
from medquad_utils.adapters import adapter_record
from medquad_utils.atomic import whole_file
from medquad_utils.chat import NOTICE, THREE_QUESTIONS, tidy_question
from medquad_utils.data import HUB_DATASET
from medquad_utils.evaluation import adapted, check_question, whole_archive
from medquad_utils.files import ASSETS
from medquad_utils.profiles import Plan, resolve
from medquad_utils.publishing import COURSE, check_name, licence_of
from medquad_utils.retrieval import NO_SOURCE, Hit, Index, Support, cite, dose_notes
from medquad_utils.safety import Flag, guarded, red_flag
from medquad_utils.serving import HOST, MAX_WAITING, announce, stoppable
from medquad_utils.splits import template_of

# Gradio reads these at its import: no telemetry, no proxy for this machine's own addresses.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
machine.direct_loopback()
import gradio  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ASSETS), autoescape=jinja2.select_autoescape(["html.jinja"]),
    trim_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
PORT = 7860
MAX_CHARACTERS = 2_000  # of a question; nothing reads more of it
MAX_BYTES = 1_000_000  # of a request
MAX_TURNS = 20  # of a conversation; older ones leave the page

VARIANTS = {"tuned": "after training (tuned)", "base": "before training (base)"}
# MedQuAD's most frequent question types and their wording; "" leaves the question as typed.
QTYPES = {
    "": "{}", "information": "What is (are) {}?", "symptoms": "What are the symptoms of {}?",
    "causes": "What causes {}?", "treatment": "What are the treatments for {}?",
    "outlook": "What is the outlook for {}?", "exams and tests": "How to diagnose {}?",
    "susceptibility": "Who is at risk for {}?", "prevention": "How to prevent {}?",
    "inheritance": "Is {} inherited?",
}  # fmt: skip
TOO_LONG = f"The question is too long: at most {MAX_CHARACTERS:,} characters are read."
BROKEN_OFF = (
    "The answer broke off here: the model failed. Ask again. "
    "If it fails again, look at the terminal where the demo was started."
)
STOPPED = "Stopped before the end."
UNANSWERED = "No answer: it was stopped, or too many people are waiting. Ask again."


def phrase(text: str, qtype: str) -> str:
    """Word a disease, or a question in MedQuAD's form, as MedQuAD's question of ``qtype``."""
    bare = text.strip().rstrip("? ")
    match = template_of(f"{bare} ?")
    if not qtype or not bare or ("?" in text and not match):
        return text
    return QTYPES[qtype].format(match[1] if match else bare)


# ---- the model and its conversation ---------------------------------------------------------


@dataclass
class Turn:
    """A question and its answer; a ``flag`` or ``problem`` says why there is none, or no end."""

    question: str
    variant: str = "tuned"
    max_new_tokens: int = 0
    flag: Flag | None = None
    answer: str = ""
    hits: list[Hit] | None = None  # None: not looked up yet
    supports: list[Support] = field(default_factory=list)
    problem: str = ""

    @property
    def doses(self) -> list[str]:
        """Notes on the numbers of the answer, once no more of it comes."""
        if self.hits is None and not self.problem:
            return []
        return dose_notes(self.answer, lambda: self.supports or cite(None, "", self.answer)[1])

    @property
    def markup(self) -> str:
        """Render the reply as HTML; every text in it is escaped."""
        return TEMPLATES.get_template("demo.html.jinja").render(
            turn=self, variant=VARIANTS[self.variant], no_source=NO_SOURCE
        )


@dataclass
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
        return [*VARIANTS] if hasattr(self.model, "disable_adapter") else ["tuned"]

    def ask(self, text: str, qtype: str, variant: str, max_new_tokens: int) -> Turn:
        """Return the next turn: ready to be answered, or with the reason why it will not be."""
        text, whole = text[:MAX_CHARACTERS], text
        turn = Turn(tidy_question(text), variant, max_new_tokens, red_flag(text))
        context, limit = self.model.config.max_position_embeddings, self.plan.max_new_tokens
        if len(whole) > MAX_CHARACTERS:
            turn.problem = TOO_LONG
            return turn
        try:
            worded = check_question(phrase(text, qtype), self.tokenizer, context, limit)
            turn.question = tidy_question(worded)
        except CourseError as error:
            turn.problem = str(error)[0].upper() + str(error)[1:]
        return turn

    def stream(self, question: str, variant: str, max_new_tokens: int) -> Iterator[str]:
        """Yield the answer piece by piece; end early when the iterator or the demo is closed."""

        def pieces() -> Iterator[str]:
            limit = max(1, min(max_new_tokens, self.plan.max_new_tokens))
            answer = generation.stream(self.model, self.tokenizer, question, limit)
            with self.free, adapted(self.model, variant), closing(answer):
                for piece in answer:
                    if self.closing.is_set():
                        return
                    yield piece

        return iter(guarded(question, pieces))

    def answer(self, turn: Turn) -> Iterator[None]:
        """Let the answer of ``turn`` grow; a failure ends in a message, not an error."""
        try:
            for piece in self.stream(turn.question, turn.variant, turn.max_new_tokens):
                turn.answer += piece
                yield
            turn.hits, turn.supports = cite(self.index, turn.question, turn.answer)
        except Exception as error:  # whatever a model can raise: the server goes on
            print(f"medquad: an answer failed: {type(error).__name__}: {error}", file=sys.stderr)
            turn.problem = BROKEN_OFF
        yield


def load(plan: Plan, adapter: Path | None = None) -> Bot:
    """Load the tuned model and its archive; ``adapter`` may hold a merged model instead."""
    folder = adapter or plan.folder / "adapter"
    if (folder / "config.json").is_file():  # a whole model: its base was not on the Hub
        plan = replace(plan, model_path=str(folder))
        model = generation.load_base(plan, quantized=plan.device == "cuda")
    else:
        model = generation.load_tuned(plan, folder)
    return Bot(plan, model, generation.load_tokenizer(plan), whole_archive(plan, folder))


# ---- the page -------------------------------------------------------------------------------


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    """Return the conversation in the form of Gradio's chat component."""
    shown = []
    for turn in turns:
        question = f'<p class="question">{escape(turn.question)}</p>'
        shown.append({"role": "user", "content": question})
        if reply := turn.markup:
            shown.append({"role": "assistant", "content": reply})
    return shown


def unfinished(turns: list[Turn]) -> bool:
    """Tell whether the last question still waits for its answer, or for more of it."""
    return bool(turns) and turns[-1].hits is None and not (turns[-1].problem or turns[-1].flag)


def page(bot: Bot) -> gradio.Blocks:
    """Build the chat as a Gradio app; it is not started yet."""
    limit, model = bot.plan.max_new_tokens, bot.plan.model_id
    name = "" if model == "embedded" else f"{model}, tuned on MedQuAD. "
    about = escape(f"{name}{bot.plan.origin}".strip())
    notice = escape(f"{NOTICE} {licence_of(bot.plan).built}".strip())
    with gradio.Blocks(title="Ask the tuned model") as app:
        head = f"<h1>Ask the tuned model</h1><p>{about} It does not see earlier questions.</p>"
        gradio.HTML(head, elem_id="head")
        with gradio.Row():
            with gradio.Column(scale=3, min_width=320):
                talk = gradio.Chatbot(
                    elem_id="chat", show_label=False, render_markdown=False, sanitize_html=True,
                    allow_tags=False, latex_delimiters=[], buttons=[], feedback_options=None,
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
                    [(name or "as typed", name) for name in QTYPES], value="",
                    label="Type of question", info="Words a disease's name as a MedQuAD question.",
                )  # fmt: skip
                length = gradio.Slider(
                    16, limit, value=limit, step=8, label="Length",
                    info="Tokens of an answer, at most.",
                )  # fmt: skip
        gradio.HTML(f"<p>{notice}</p>", elem_id="notice")
        _wire(bot, talk, box, [qtype, variant, length])
    return app.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


def _wire(bot: Bot, talk: Any, box: Any, controls: list[Any]) -> None:
    """Connect the events. ``ask`` skips the queue: an emergency's message appears at once."""
    state = gradio.State([])  # the turns; each page gets its own list, which changes in place

    def ask(text: str, turns: list[Turn], *controls: Any) -> tuple[Any, Any]:
        if unfinished(turns):
            waiting = "One question at a time: wait for the answer, or stop it."
            raise gradio.Error(waiting, print_exception=False)
        turns[:] = [*turns, bot.ask(text, *controls)][-MAX_TURNS:]
        return gradio.Textbox("", submit_btn=False, stop_btn="Stop"), messages(turns)

    def pick(event: gradio.SelectData, turns: list[Turn], *controls: Any) -> tuple[Any, Any]:
        return ask(event.value["text"], turns, *controls)

    def answer(turns: list[Turn]) -> Iterator[Any]:
        if unfinished(turns):
            for _ in bot.answer(turns[-1]):
                yield messages(turns)

    def end(turns: list[Turn]) -> tuple[Any, Any]:
        if unfinished(turns):  # stopped, or refused by the queue
            turns[-1].problem = STOPPED if turns[-1].answer else UNANSWERED
        return gradio.Textbox(submit_btn="Ask", stop_btn=False), messages(turns)

    hidden = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
    shown = {"show_progress": "minimal", "api_visibility": "private"}
    asked = (
        box.submit(ask, [box, state, *controls], [box, talk], **hidden),
        talk.example_select(pick, [state, *controls], [box, talk], **hidden),
    )
    answers = [event.success(answer, state, talk, **shown) for event in asked]
    for event in answers:
        event.then(end, state, [box, talk], **hidden)
        event.failure(end, state, [box, talk], **hidden)  # a full queue: ``then`` does not follow
    box.stop(None, cancels=answers, **hidden)
    talk.clear(lambda: [], None, state, cancels=answers, **hidden)


# ---- the server -----------------------------------------------------------------------------

# The page loads from its own server only. Gradio needs inline scripts and compiles its templates.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)


async def _guard(request: Any, call_next: Any) -> Any:
    """Send the policy with every reply."""
    try:
        response = await call_next(request)
    except ValueError:  # numbers or letters that no JSON may hold; gradio answers with them
        response = PlainTextResponse("The request cannot be read: expected plain JSON.", 400)
    response.headers["content-security-policy"] = POLICY
    return response


@contextmanager
def running(bot: Bot, host: str = HOST, port: int = PORT) -> Iterator[str]:
    """Serve inside the block, which gets the address; at its end stop, unfinished answers too."""
    app = page(bot)
    limit = Middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BYTES)
    guards = [Middleware(BaseHTTPMiddleware, dispatch=_guard), limit]
    # Gradio's own fonts come from another server.
    theme = gradio.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    try:
        app.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
            footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False,
            show_error=True, max_file_size=1, theme=theme, css_paths=ASSETS / "demo.css",
            app_kwargs={"openapi_url": None, "middleware": guards},
        )  # fmt: skip
        yield str(app.local_url)
    finally:
        bot.closing.set()
        app.close(verbose=False)
        if bot.free.acquire(timeout=10):  # the last answer has ended
            bot.free.release()


def serve(bot: Bot, host: str = HOST, port: int = PORT) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    with stoppable("The demo"), running(bot, host, port) as address:
        announce("The demo", address, host)
        while True:
            time.sleep(1)


# ---- a Space --------------------------------------------------------------------------------

SPACE_FILES = ("app.py", "requirements.txt", "README.md")


def serve_space(repo: str, profile: str, model: str = "") -> None:
    """Fetch the published ``repo`` from the Hub and serve it to everybody; app.py calls this.

    Its base is ``model``, or the profile's, at the commit that the adapter names.
    """
    from huggingface_hub import snapshot_download

    folder, plan = Path(snapshot_download(repo)), resolve(profile, model=model)
    plan = replace(plan, revision=adapter_record(folder).get("revision") or plan.revision)
    serve(load(plan, folder), "0.0.0.0", int(os.environ.get("GRADIO_SERVER_PORT", PORT)))


def write_space(folder: Path, repo: str, plan: Plan) -> Path:
    """Write the three files of a Space that shows the published ``repo``."""
    check_name(repo, plan)
    if others := {path.name for path in folder.glob("*")} - set(SPACE_FILES):
        raise CourseError(f"--space {folder.name}: it holds {min(others)}. Choose another folder.")
    values = {
        "repo": repo, "plan": plan, "licence": licence_of(plan), "notice": NOTICE,
        "course": COURSE, "dataset": HUB_DATASET,
        "version": lambda package: importlib.metadata.version(package).partition("+")[0],
    }  # fmt: skip
    for name in SPACE_FILES:
        with whole_file(folder / name) as temporary:
            text = TEMPLATES.get_template(f"space/{name}.jinja").render(values)
            temporary.write_text(text, encoding="utf-8")
    return folder
