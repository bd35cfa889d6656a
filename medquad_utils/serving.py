"""Serve a published model on this machine behind the OpenAI API, and describe it to Ollama."""

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
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medquad_utils import CourseError
from medquad_utils.chat import SYSTEM_PROMPT, end_ids
from medquad_utils.files import whole_file
from medquad_utils.machine import free_memory

if TYPE_CHECKING:
    from openai import OpenAI
    from transformers import PreTrainedTokenizerBase

HOST = "127.0.0.1"  # loopback: no other machine can connect


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
    log, began = folder.with_name("serve.log"), time.perf_counter()
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            line, cwd=folder.parent, env=offline, stdout=out, stderr=subprocess.STDOUT
        )
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
