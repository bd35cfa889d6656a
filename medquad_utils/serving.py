"""Serve a model behind the OpenAI API, guarded or bare, and describe it to Ollama."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import BoundedSemaphore, Event
from typing import TYPE_CHECKING, Any

from medquad_utils import CourseError, generation
from medquad_utils.chat import NOTICE, SYSTEM_PROMPT, end_ids, prompt_ids, prompt_messages
from medquad_utils.evaluation import archive_of_run
from medquad_utils.files import whole_file
from medquad_utils.machine import direct_loopback, free_memory
from medquad_utils.profiles import Plan
from medquad_utils.retrieval import Index, cite, dose_notes
from medquad_utils.safety import guarded, red_flag
from medquad_utils.tables import clean_text

if TYPE_CHECKING:
    from openai import OpenAI
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HOST = "127.0.0.1"  # loopback: no other machine can connect
Pieces = AsyncGenerator[tuple[str, str | None], None]  # text, and how the answer ended


@dataclass
class Server:
    """A running `transformers serve`, a child process that ends with this one."""

    process: subprocess.Popen[bytes]
    model: str  # the name that a request must give
    address: str  # an OpenAI client's base_url
    log: Path
    seconds: float  # from the start to the first answer

    def stop(self) -> int:
        """End this one process and return its exit status; a second call does nothing."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def command(model: str, port: int) -> str:
    """Return the terminal command that starts the server, for the folder above ``model``."""
    return shlex.join(["transformers", "serve", model, "--host", HOST, "--port", str(port)])


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def end_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, even by SIGKILL (prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def start(folder: Path, port: int = 0, patience: float = 600.0) -> Server:
    """Run ``transformers serve`` on ``folder``, a whole model, and wait until it answers.

    Port 0 takes a free one. The limit is ``patience`` seconds.
    """
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise CourseError(
            f"{folder.name}/ holds {'an adapter without its base' if adapter else 'no model'}: "
            "expected a whole model, as from medquad publish --merged --dry-run."
        )
    port = port or free_port()
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise CourseError(f"port {port} is in use: choose another port (0 finds a free one).")
    _, *arguments = shlex.split(command(folder.name, port))
    line = [sys.executable, "-m", "transformers.cli.transformers", *arguments]
    free_memory()  # the server is another process
    direct_loopback()
    log, began = folder.with_name("serve.log"), time.perf_counter()
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            line, cwd=folder.parent, env=offline, stdout=out, stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
    server = Server(process, folder.name, f"http://{HOST}:{port}/v1", log, 0.0)
    atexit.register(server.stop)
    _wait(server, port, patience)
    server.seconds = time.perf_counter() - began
    return server


def _wait(server: Server, port: int, patience: float) -> None:
    deadline = time.perf_counter() + patience
    while not _healthy(port):
        if server.process.poll() is not None:
            text = server.log.read_text(encoding="utf-8", errors="replace").strip()
            last = text.split("\n")[-1][:200] or "no output"
            raise CourseError(
                f"transformers serve ended before it answered ({last}): see {server.log.name}."
            )
        if time.perf_counter() > deadline:
            server.stop()
            raise CourseError(
                f"transformers serve did not answer within {patience:g} s and was ended: "
                f"see {server.log.name}."
            )
        time.sleep(0.1)


def _healthy(port: int) -> bool:
    # http.client ignores proxy settings, which must not apply to this machine
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    with closing(connection), suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def stream(
    client: OpenAI, model: str, messages: Sequence[Mapping[str, str]], **settings: Any
) -> Iterator[str]:
    """Yield the pieces of one answer; ``settings`` go to ``chat.completions.create``.

    Raises:
        CourseError: the server refuses, is not there, or breaks off before the end of the answer.
    """
    import openai

    create, pieces, complete = client.chat.completions.create, 0, False
    reason = "the stream ended without a finish_reason"
    try:
        for chunk in create(model=model, messages=list(messages), stream=True, **settings):
            for choice in chunk.choices[:1]:
                complete = complete or choice.finish_reason is not None
                if choice.delta.content:
                    pieces += 1
                    yield choice.delta.content
    except openai.APIStatusError as error:
        reason = " ".join(f"{error.status_code} {error.response.text}".split())[:200]
        raise CourseError(f"the server refused the request ({reason}).") from error
    except (openai.APIError, json.JSONDecodeError) as error:  # the latter: a line cut in half
        complete, reason = False, " ".join(str(error).split())[:200]
    if not complete:
        raise CourseError(
            f"no complete answer: it broke off after {pieces} pieces ({reason}). "
            "Start the server, and check base_url."
        )


# ---- the guarded server: medquad serve ------------------------------------------------------

MAX_BYTES = 32_000  # of a request
MAX_TURNS = 20  # of a conversation, system messages aside
MAX_WAITING = 32  # conversations that are answered or wait; one is answered at a time
MAX_CONNECTIONS = 256
PATIENCE = 20.0  # seconds for a client to send its request


class Refusal(CourseError):
    """A request that gets no answer: the HTTP ``status`` and what the client can do."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def conversation(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the user's and assistant's turns of a request; the last is the question.

    A client's system messages are ignored: ``generation.stream`` sends the course's own.
    """
    messages, turns = body.get("messages"), list[dict[str, Any]]()
    for message in messages if isinstance(messages, list) else ():
        given = message if isinstance(message, dict) else {}
        role, content = given.get("role"), given.get("content")
        if role in ("system", "developer"):
            continue
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts: list[Any] = [p.get("text") if isinstance(p, dict) else None for p in parts]
        if not all(isinstance(text, str) for text in texts):
            raise Refusal(400, "messages: expected every content to be text.")
        turns.append({"role": role, "content": clean_text("\n".join(texts))})
    roles = [turn["role"] for turn in turns]
    if not roles or roles != (["user", "assistant"] * MAX_TURNS)[: len(roles) // 2 * 2 + 1]:
        text = "expected a list of user and assistant turns, one after the other, the user's last"
        raise Refusal(400, f"messages: {text}.")
    if len(turns) > MAX_TURNS or not turns[-1]["content"]:
        raise Refusal(400, f"messages: expected at most {MAX_TURNS} turns, and a question.")
    return turns


async def body_of(request: Request) -> dict[str, Any]:
    """Read a JSON object of at most ``MAX_BYTES``, within ``PATIENCE`` seconds."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refusal(415, "expected the content type application/json.")  # no form of a web page
    content = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                content += part
                if len(content) > MAX_BYTES:
                    raise Refusal(413, f"a request may have {MAX_BYTES:,} bytes at most.")
    except TimeoutError:
        raise Refusal(408, f"the request did not arrive within {PATIENCE:g} s.") from None
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Refusal(400, "expected JSON in UTF-8.") from None
    if not isinstance(value, dict):
        raise Refusal(400, "expected a JSON object.")
    return value


@dataclass
class Guard:
    """A loaded model that answers one conversation at a time; a bounded number of others wait."""

    plan: Plan
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    places: BoundedSemaphore = field(default_factory=lambda: BoundedSemaphore(MAX_WAITING))
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    closing: Event = field(default_factory=Event)

    @cached_property
    def index(self) -> Index | None:
        """The rows of the run, where a dose may have its source."""
        return archive_of_run(self.plan)

    @property
    def name(self) -> str:
        """The model's name in a request."""
        return f"medquad-{self.plan.profile}"

    def limit(self, body: Mapping[str, Any]) -> int:
        """Check what else a request asks for; return the most tokens of its answer."""
        if body.get("model") != self.name:
            raise Refusal(404, f"model: this server has {self.name!r} only.")
        if body.get("n") not in (None, 1) or body.get("stream") not in (None, True, False):
            raise Refusal(400, "expected n to be 1, and stream to be true or false.")
        limits = [self.plan.max_new_tokens]
        limits += [
            body[k] for k in ("max_tokens", "max_completion_tokens") if body.get(k) is not None
        ]
        if not all(type(limit) is int and limit > 0 for limit in limits):
            raise Refusal(400, "max_tokens: expected a whole number over 0.")
        return min(limits)

    def queue(self, turns: list[dict[str, str]], limit: int) -> Pieces:
        """Let a conversation wait for its answer: a place in the queue, or a refusal."""
        *history, question = turns
        prompt = prompt_ids(self.tokenizer, prompt_messages(question["content"], history))
        context = int(self.model.config.max_position_embeddings)
        if len(prompt) + limit > context:
            needed = f"with its answer {len(prompt) + limit:,} tokens"
            text = f"the conversation is too long: {needed}, and the model reads {context:,}."
            raise Refusal(400, text)
        if not self.places.acquire(blocking=False):
            raise Refusal(503, f"{MAX_WAITING} conversations wait already. Ask again in a minute.")
        loop, ready, gone = asyncio.get_running_loop(), asyncio.Queue[Any](), Event()

        def work() -> None:
            for item in self.items(question["content"], history, limit, gone):
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(ready.put_nowait, item)

        async def pieces() -> Pieces:
            reason = None
            try:
                while reason is None:
                    if isinstance(item := await ready.get(), Refusal):
                        raise item
                    piece, reason = item
                    yield piece, reason
            finally:  # the client may have gone
                gone.set()
                job.cancel()

        job = self.worker.submit(work)
        job.add_done_callback(lambda _: self.places.release())
        return pieces()

    def items(
        self, question: str, history: Sequence[Mapping[str, str]], limit: int, gone: Event
    ) -> Iterator[tuple[str, str | None] | Refusal]:
        """Yield an answer's pieces, the notice last, until ``gone``; a failure is an item too."""
        stream = generation.stream(self.model, self.tokenizer, question, limit, history)
        try:
            with closing(stream):
                while not (gone.is_set() or self.closing.is_set()):
                    yield next(stream), None
            yield Refusal(503, "the server is stopping.")
        except StopIteration as end:
            text = end.value.text
            notes = dose_notes(text, lambda: cite(self.index, question, text)[1])
            notice = "\n".join(["\n", *notes, NOTICE])
            yield notice, "stop" if end.value.stopped else "length"
        except Exception as error:  # whatever a model can raise: the server goes on
            print(f"medquad: an answer failed: {error!r}", file=sys.stderr, flush=True)
            yield Refusal(500, "the model failed. Ask again.")

    async def chat(self, request: Request) -> Response:
        """Answer ``POST /v1/chat/completions``.

        An emergency in any of the user's turns gets its message at once, however long the queue.
        """
        from starlette.responses import JSONResponse, StreamingResponse

        body = await body_of(request)
        turns = conversation(body)
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        urgent = next((text for text in asked if red_flag(text)), asked[-1])
        pieces = guarded(urgent, lambda: self.queue(turns, self.limit(body)))
        if isinstance(pieces, list):
            pieces = told(pieces)
        kind = "chat.completion" + (".chunk" if body.get("stream") else "")
        reply = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
        reply |= {"model": self.name}
        if body.get("stream"):
            return StreamingResponse(events(reply, pieces), media_type="text/event-stream")
        said: list[tuple[str, str | None]] = []
        async with aclosing(pieces):
            async for item in pieces:
                said.append(item)
                if await request.is_disconnected():
                    break
        message = {"role": "assistant", "content": "".join(text for text, _ in said).strip()}
        choice = {"index": 0, "message": message, "finish_reason": said[-1][1]}
        return JSONResponse(reply | {"choices": [choice]})


async def told(texts: Iterable[str]) -> Pieces:
    """Yield ``texts`` as a whole answer."""
    for text in texts:
        yield text, "stop"


async def events(reply: Mapping[str, Any], pieces: Pieces) -> AsyncIterator[str]:
    """Yield an answer as server-sent events; without its end if the model fails."""
    try:
        async with aclosing(pieces):
            async for piece, reason in pieces:
                delta = {"role": "assistant", "content": piece}
                choice = {"index": 0, "delta": delta, "finish_reason": reason}
                yield f"data: {json.dumps({**reply, 'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"
    except Refusal as refusal:
        yield f"data: {json.dumps(problem(refusal))}\n\n"


def problem(error: Exception) -> dict[str, Any]:
    """Describe an error as the OpenAI API does."""
    message = getattr(error, "detail", str(error))
    return {"error": {"message": message, "type": "invalid_request_error", "code": None}}


def app(guard: Guard) -> Starlette:
    """Build the server: chat, list of models, health."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def models(request: Request) -> Response:
        model = {"id": guard.name, "object": "model", "created": 0, "owned_by": "medquad"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def refuse(request: Request, error: Any) -> Response:
        status = getattr(error, "status", getattr(error, "status_code", 400))
        headers = {"Retry-After": "60"} if status == 503 else None
        return JSONResponse(problem(error), status, headers)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", guard.chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        exception_handlers=dict.fromkeys([Refusal, HTTPException, ClientDisconnect], refuse),
    )


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on the port."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise CourseError(
            f"cannot listen on {host}:{port}: {error}. "
            "Stop the other program, or take another port with --port."
        ) from error


def serve(guard: Guard, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM; answers that are under way have five seconds to end."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        """Close a connection that has no request under way, again and again."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(PATIENCE, self.look)

        def look(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()
            elif not self.transport.is_closing():
                self.loop.call_later(PATIENCE, self.look)

    config = uvicorn.Config(
        app(guard), host=host, port=port, http=Impatient, ws="none", lifespan="off",
        log_level="critical", access_log=False, limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=5, server_header=False, proxy_headers=False,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(f"{guard.name} answers at http://{host}:{port}/v1 (Ctrl-C stops it).", flush=True)
        if host not in (HOST, "localhost", "::1"):
            print("Everyone who reaches it can use it: there is no password.", flush=True)
        uvicorn.Server(config).run()
    except KeyboardInterrupt:
        print("\nThe server has stopped.", flush=True)
    finally:
        guard.closing.set()
        guard.worker.shutdown(cancel_futures=True)


# ---- Ollama ---------------------------------------------------------------------------------

MODELFILE = '''FROM ./{folder}
TEMPLATE """{{{{ range .Messages }}}}{turn}{{{{ end }}}}{opening}"""
{stops}
PARAMETER temperature 0
PARAMETER num_predict {most_tokens}
SYSTEM """{system}"""
'''


def write_modelfile(tokenizer: PreTrainedTokenizerBase, folder: Path, most_tokens: int) -> Path:
    """Write Ollama's ``Modelfile`` beside the merged model in ``folder``; answers are greedy.

    Ollama has a template language of its own (Go's). The turn is read off one rendered turn and
    then compared with a rendered conversation. Ollama adds BOS itself.
    """
    roles = ("system", "user", "assistant", "user")
    talk = [{"role": role, "content": f"«{n}»"} for n, role in enumerate(roles)]

    def render(count: int, opening: bool = False) -> str:
        text = tokenizer.apply_chat_template(
            talk[:count], tokenize=False, add_generation_prompt=opening
        )
        return str(text).removeprefix(str(tokenizer.bos_token or ""))

    turn = render(1).replace("system", "{{ .Role }}", 1).replace("«0»", "{{ .Content }}", 1)
    turns = (
        turn.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in talk
    )
    if "".join(turns) != render(4):
        raise CourseError(
            "the chat template has not the same form for every role: write Ollama's TEMPLATE by "
            "hand, from a rendered conversation."
        )
    ends = tokenizer.convert_ids_to_tokens(end_ids(tokenizer))
    text = MODELFILE.format(
        folder=folder.name, turn=turn, opening=render(4, opening=True).removeprefix(render(4)),
        system=SYSTEM_PROMPT, stops="\n".join(f'PARAMETER stop "{end}"' for end in ends),
        most_tokens=most_tokens,
    )  # fmt: skip
    path = folder.with_name("Modelfile")
    with whole_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return path
