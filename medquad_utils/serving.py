"""Serve a model behind the OpenAI API, guarded or bare."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import BoundedSemaphore, Event
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from medquad_utils import CourseError, generation
from medquad_utils.chat import NOTICE, prompt_ids, prompt_messages
from medquad_utils.evaluation import archive_of_run
from medquad_utils.machine import direct_loopback, free_memory
from medquad_utils.profiles import Plan
from medquad_utils.retrieval import Index, cite, dose_notes
from medquad_utils.safety import guarded, red_flag
from medquad_utils.tables import clean_text, has_words

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HOST = "127.0.0.1"  # loopback: no other machine can connect
Pieces = AsyncGenerator[tuple[str, str | None], None]  # text, and how the answer ended


def check_port(host: str = HOST, port: int = 0) -> int:
    """Check that a server can listen on the port, and return it; for 0, return a free one."""
    try:
        with socket.create_server((host, port)) as probe:
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise CourseError(
            f"cannot listen on {host}:{port}: {str(error).rstrip('.')}. Stop the other program, or "
            "take another port with --port. Expected an address of this machine after --host: "
            f"{HOST}, or 0.0.0.0 for all."
        ) from error


@contextmanager
def stoppable(what: str) -> Iterator[None]:
    """Let Ctrl-C or SIGTERM end the block, and say so."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{what} has stopped.", flush=True)


def announce(what: str, address: str, host: str) -> None:
    """Print where ``what`` runs, and who can use it."""
    print(f"{what} runs at {address} (Ctrl-C stops it).", flush=True)
    if host not in (HOST, "localhost"):
        print("Everyone who reaches it can use it: there is no password.", flush=True)


# ---- a bare server in a child process: transformers serve -----------------------------------


@dataclass
class Server:
    """A running server, a child process that ends with this one."""

    process: subprocess.Popen[bytes]
    model: str  # the name that a request must give
    address: str  # an OpenAI client's base_url
    log: Path

    def stop(self) -> int:
        """End this one process and return its exit status; a second call does nothing."""
        self.process.kill()
        return self.process.wait()


def start(folder: Path, port: int = 0, patience: float = 600.0) -> Server:
    """Run ``transformers serve`` on ``folder``, a whole model, and wait until it answers.

    Port 0 takes a free one; ``patience`` is in seconds.
    """
    if not (folder / "config.json").is_file():
        raise CourseError(
            f"{folder.name}/ holds no whole model: expected one as from medquad publish --merged "
            "--dry-run."
        )
    port = check_port(HOST, port)
    line = ["transformers.cli.transformers", "serve", folder.name]
    return launch(line, folder.name, port, folder.with_name("serve.log"), patience)


def launch(line: Sequence[str], model: str, port: int, log: Path, patience: float) -> Server:
    """Run a Python module with its options as a server of ``model``, in the folder of its log."""
    free_memory()  # the server is another process
    direct_loopback()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *line, "--host", HOST, "--port", str(port)],
            cwd=log.parent, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=out, stderr=out,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
    server = Server(process, model, f"http://{HOST}:{port}/v1", log)
    atexit.register(server.stop)
    deadline = time.monotonic() + patience
    while not _healthy(port):
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            server.stop()
            output = log.read_text(encoding="utf-8", errors="replace").strip()
            last = output.rpartition("\n")[2][:200] or "no output"
            why = f"transformers serve did not answer within {patience:g} s"
            why = "transformers serve ended before it answered" if ended else why
            raise CourseError(f"{why} ({last}): see {log.name}.")
        time.sleep(0.1)
    return server


def end_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, even by SIGKILL (prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def _healthy(port: int) -> bool:
    with suppress(OSError, http.client.HTTPException):
        urlopen(f"http://{HOST}:{port}/health", timeout=5).close()  # raises if the status is bad
        return True
    return False


# ---- the guarded server: medquad serve ------------------------------------------------------

MAX_BYTES = 32_000  # of a request
MAX_WAITING = 32  # conversations that are answered or wait; one is answered at a time
MAX_CONNECTIONS = 256
PATIENCE = 20.0  # seconds for a client to send its request


async def body_of(request: Request) -> dict[str, Any]:
    """Read a JSON object that arrives within ``PATIENCE`` seconds."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise HTTPException(415, "expected the content type application/json.")  # no web form
    try:
        async with asyncio.timeout(PATIENCE):
            if isinstance(body := await request.json(), dict):
                return body
    except TimeoutError:
        raise HTTPException(408, f"the request did not arrive within {PATIENCE:g} s.") from None
    except (ValueError, RecursionError):
        pass
    raise HTTPException(400, "expected a JSON object.")


def conversation(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the user's and assistant's turns of a request; the last is the question.

    A client's system messages are ignored: ``generation.stream`` sends the course's own.
    """
    turns: list[dict[str, str]] = []
    try:
        for message in body["messages"]:
            role, content = message["role"], message["content"]
            parts = content if isinstance(content, list) else [{"text": content}]
            text = clean_text("\n".join(part["text"] for part in parts))
            if role not in ("system", "developer"):
                turns.append({"role": role, "content": text})
    except (KeyError, TypeError):
        wrong = "expected a list of messages, each with a role and a text."
        raise HTTPException(400, f"messages: {wrong}") from None
    roles = [turn["role"] for turn in turns]
    if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        text = "expected a list of user and assistant turns, one after the other, the user's last."
        raise HTTPException(400, f"messages: {text}")
    if not has_words(turns[-1]["content"]):
        raise HTTPException(400, "messages: the last one is empty: expected a question.")
    return turns


@dataclass
class Guard:
    """A loaded model that answers one conversation at a time; a bounded number of others wait."""

    plan: Plan
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    places: BoundedSemaphore = field(default_factory=lambda: BoundedSemaphore(MAX_WAITING))
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

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
            raise HTTPException(404, f"model: this server has {self.name!r} only.")
        if body.get("n") not in (None, 1) or body.get("stream") not in (None, True, False):
            raise HTTPException(400, "expected n to be 1, and stream to be true or false.")
        asked = [body.get("max_tokens"), body.get("max_completion_tokens")]
        limits: list[int] = [self.plan.max_new_tokens, *(n for n in asked if n is not None)]
        if not all(type(limit) is int and limit > 0 for limit in limits):
            raise HTTPException(400, "max_tokens: expected a whole number over 0.")
        return min(limits)

    def queue(self, turns: list[dict[str, str]], limit: int) -> Pieces:
        """Let a conversation wait for its answer, or refuse it."""
        *history, question = turns
        prompt = prompt_ids(self.tokenizer, prompt_messages(question["content"], history))
        context = int(self.model.config.max_position_embeddings)
        if len(prompt) + limit > context:
            needed = f"with its answer {len(prompt) + limit:,} tokens"
            text = f"the conversation is too long: {needed}, and the model reads {context:,}."
            raise HTTPException(400, text)
        if not self.places.acquire(blocking=False):
            text = f"{MAX_WAITING} conversations wait or are answered. Ask again in a minute."
            raise HTTPException(503, text, {"Retry-After": "60"})
        loop, ready, gone = asyncio.get_running_loop(), asyncio.Queue[Any](), Event()

        def work() -> None:
            for item in self.items(question["content"], history, limit, gone):
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(ready.put_nowait, item)

        async def pieces() -> Pieces:
            reason = None
            try:
                while reason is None:
                    if isinstance(item := await ready.get(), HTTPException):
                        raise item
                    piece, reason = item
                    yield piece, reason
            finally:  # the client may have gone, or the server stops
                gone.set()
                job.cancel()

        job = self.worker.submit(work)
        job.add_done_callback(lambda _: self.places.release())
        return pieces()

    def items(
        self, question: str, history: Sequence[Mapping[str, str]], limit: int, gone: Event
    ) -> Iterator[tuple[str, str | None] | HTTPException]:
        """Yield an answer's pieces, the notice last, until ``gone``; a failure is an item too."""
        stream = generation.stream(self.model, self.tokenizer, question, limit, history)
        try:
            with closing(stream):
                try:
                    while not gone.is_set():
                        yield next(stream), None
                except StopIteration as end:
                    text = end.value.text
                    notes = dose_notes(text, lambda: cite(self.index, question, text)[1])
                    origin = filter(None, [self.plan.origin])
                    notice = "\n".join(["\n", *notes, NOTICE, *origin])
                    yield notice, "stop" if end.value.stopped else "length"
        except Exception as error:  # of the model, or of the archive: the server goes on
            print(f"medquad: an answer failed: {error!r}", file=sys.stderr, flush=True)
            yield HTTPException(500, "the model failed. Ask again.")

    async def chat(self, request: Request) -> Response:
        """Answer ``POST /v1/chat/completions``.

        An emergency in any of the user's turns gets its message at once, however long the queue.
        """
        body = await body_of(request)
        turns = conversation(body)
        asked = [turn["content"] for turn in turns[::2]]  # by the user
        urgent = next(filter(red_flag, asked), asked[-1])
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
    except HTTPException as refusal:
        yield f"data: {json.dumps(problem(refusal))}\n\n"


def problem(error: HTTPException) -> dict[str, Any]:
    """Describe an error as the OpenAI API does."""
    return {"error": {"message": error.detail, "type": "invalid_request_error", "code": None}}


def app(guard: Guard) -> Starlette:
    """Build the server: chat, list of models, health."""

    async def refuse(_: Request, error: Any) -> Response:
        return JSONResponse(problem(error), error.status_code, error.headers)

    model = {"id": guard.name, "object": "model", "created": 0, "owned_by": "medquad"}
    routes = [
        Route("/v1/chat/completions", guard.chat, methods=["POST"]),
        Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [model]})),
        Route("/health", lambda _: JSONResponse({"status": "ok"})),
    ]
    handlers = {HTTPException: refuse}
    return Starlette(routes=routes, exception_handlers=handlers, max_body_size=MAX_BYTES)


def serve(guard: Guard, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM; answers that are under way have five seconds to end."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        """Every ``PATIENCE`` seconds, close the connection if no request is under way."""

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
    try:
        with stoppable(guard.name):
            announce(guard.name, f"http://{host}:{port}/v1", host)
            uvicorn.Server(config).run()
    finally:
        guard.worker.shutdown(cancel_futures=True)
