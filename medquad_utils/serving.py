"""A published model behind the OpenAI API: `transformers serve` on this machine, and what Ollama needs to ask it in the same way."""

from __future__ import annotations

import atexit
import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medquad_utils import CourseError
from medquad_utils.chat import SYSTEM_PROMPT, end_ids
from medquad_utils.files import whole_file

if TYPE_CHECKING:
    from openai import OpenAI
    from transformers import PreTrainedTokenizerBase

HOST = "127.0.0.1"  # loopback: no other machine can ask
LOG = "serve.log"  # beside the folder that is served


@dataclass
class Server:
    """A running `transformers serve`.

    Attributes:
        process: the server, a child of this process; it ends with it.
        model: the name that a request has to give.
        address: what an OpenAI client takes as its ``base_url``.
        log: what the server says.
        seconds: from the start to the first answer.
    """

    process: subprocess.Popen[bytes]
    model: str
    address: str
    log: Path
    seconds: float

    def stop(self) -> int:
        """End the server, this process and no other; returns its exit status. Stopping it once more changes nothing."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def command(model: str, port: int, options: Sequence[str] = ()) -> str:
    """The line that starts the server in a terminal, in the folder above ``model``."""
    return shlex.join(["transformers", *_arguments(model, port, options)])


def _arguments(model: str, port: int, options: Sequence[str]) -> list[str]:
    return ["serve", model, "--host", HOST, "--port", str(port), *options]


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def start(
    folder: Path, port: int = 0, options: Sequence[str] = (), patience: float = 600.0
) -> Server:
    """Run ``transformers serve`` on ``folder``, a whole model, and wait until it answers.

    ``port`` 0 takes a free one; ``options`` go to the command (``transformers serve --help``). It waits ``patience`` seconds at most.
    The server hears on loopback alone, looks at no network, and ends with this process.

    Raises:
        CourseError: no whole model in ``folder``; a package is missing; the port is in use; the server ended or is too slow.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise CourseError(
            "transformers serve lacks a package: pip install openai fastapi uvicorn, then try again."
        )
    if not (folder / "config.json").is_file():
        what = (
            "an adapter without its base"
            if (folder / "adapter_config.json").is_file()
            else "no model"
        )
        raise CourseError(
            f"{folder.name}/ holds {what}: a server wants a whole model, as medquad publish --merged --dry-run builds it."
        )
    port = port or free_port()
    if _open(port):
        raise CourseError(
            f"port {port} is in use: end what listens there, or take another port (0 finds a free one)."
        )
    line = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        *_arguments(folder.name, port, options),
    ]
    log, began = folder.with_name(LOG), time.perf_counter()
    with log.open("wb") as said:
        process = subprocess.Popen(
            line,
            cwd=folder.parent,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, folder.name, f"http://{HOST}:{port}/v1", log, 0.0)
    atexit.register(server.stop)
    while not _healthy(port):
        if process.poll() is not None:
            raise CourseError(
                f"transformers serve ended before it answered ({_last_line(log)}). All it said is in {log.name}."
            )
        if time.perf_counter() - began > patience:
            server.stop()
            raise CourseError(
                f"transformers serve did not answer within {patience:g} s and was ended. All it said is in {log.name}."
            )
        time.sleep(0.1)
    server.seconds = time.perf_counter() - began
    return server


def _open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _healthy(port: int) -> bool:
    """Whether the server answers; asked without the proxy that this machine may have."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")


def stream(
    client: OpenAI, model: str, messages: Sequence[Mapping[str, str]], **settings: Any
) -> Iterator[str]:
    """The pieces of one answer as they come; ``settings`` are those of ``chat.completions.create``.

    Raises:
        CourseError: the server is not there, refuses, or breaks off before the answer is at its end. What came before has been given.
    """
    import openai

    came, ended = 0, False
    try:
        for chunk in client.chat.completions.create(
            model=model, messages=list(messages), stream=True, **settings
        ):
            for choice in chunk.choices[:1]:
                ended = ended or choice.finish_reason is not None
                if choice.delta.content:
                    came += 1
                    yield choice.delta.content
    except openai.APIStatusError as error:
        raise CourseError(f"the server refused the request ({_detail(error)}).") from error
    except (
        openai.APIError,
        json.JSONDecodeError,
    ) as error:  # the second: a line that was cut in the middle
        raise CourseError(_broken(came, " ".join(str(error).split())[:200])) from error
    if not ended:
        raise CourseError(_broken(came, "the stream ended without a finish_reason"))


def _broken(came: int, why: str) -> str:
    if not came:
        return f"the server does not answer ({why}): start it, and look at base_url."
    return f"the server went away in the middle of an answer, after {came} pieces ({why}). The answer is not whole: start it, ask again."


def _detail(error: Any) -> str:
    """What the server says about a refused request, on one line."""
    body = error.body
    said = body.get("detail") if isinstance(body, Mapping) else body
    return " ".join(f"{error.status_code} {said or error.message}".split())[:200]


# ---- Ollama ---------------------------------------------------------------------------------------------------------

_ROLES = ("system", "user", "assistant")


def go_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template as Ollama writes templates, in Go's language, without BOS: Ollama adds that itself.

    It is read off one rendered turn and then held to a whole conversation. Trimming is not carried over.

    Raises:
        CourseError: the turns have not one form for all roles (dates, tools or a fixed system turn in them, for example).
    """

    def rendered(messages: list[dict[str, str]], opening: bool = False) -> str:
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
        )
        return text.removeprefix(str(tokenizer.bos_token or ""))

    talk = [{"role": role, "content": f"«{n} {role}»"} for n, role in enumerate((*_ROLES, "user"))]
    try:
        one = rendered([{"role": "system", "content": "«»"}])
        whole, closed = rendered(talk, opening=True), rendered(talk)
    except Exception as error:  # whatever a template raises on purpose or by mistake
        raise CourseError(
            f"the chat template does not render a plain conversation ({type(error).__name__}: {error})."
        ) from error
    turn = one.replace("system", "{{ .Role }}", 1).replace("«»", "{{ .Content }}", 1)
    expected = "".join(
        turn.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in talk
    )
    if expected != closed or not whole.startswith(closed):
        raise CourseError(
            "the chat template has not one form for every turn: write Ollama's TEMPLATE by hand, from its rendering."
        )
    return f"{{{{ range .Messages }}}}{turn}{{{{ end }}}}{whole.removeprefix(closed)}"


def modelfile(tokenizer: PreTrainedTokenizerBase, folder: str, most_tokens: int) -> str:
    """Ollama's Modelfile for the merged model in ``folder``: template, stops, greedy answers of ``most_tokens``, the system prompt.

    Raises:
        CourseError: what ``go_template`` raises.
    """
    stops = [tokenizer.convert_ids_to_tokens(i) for i in end_ids(tokenizer)]
    return "\n".join(
        [
            f"FROM {folder}",
            f'TEMPLATE """{go_template(tokenizer)}"""',
            *(f'PARAMETER stop "{stop}"' for stop in stops),
            "PARAMETER temperature 0",
            f"PARAMETER num_predict {most_tokens}",
            f'SYSTEM """{SYSTEM_PROMPT}"""',
            "",
        ]
    )


def write_modelfile(tokenizer: PreTrainedTokenizerBase, folder: Path, most_tokens: int) -> Path:
    """Write ``Modelfile`` beside the merged model in ``folder``; returns its path.

    Raises:
        CourseError: what ``go_template`` raises.
    """
    text, path = (
        modelfile(tokenizer, f"./{folder.name}", most_tokens),
        folder.with_name("Modelfile"),
    )
    with whole_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return path
