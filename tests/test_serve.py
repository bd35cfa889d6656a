"""A published folder behind the OpenAI API, asked over loopback; servers that die; and Ollama's template against the tokenizer's own."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from medquad_utils import chat, generation, publishing, serving
from medquad_utils.profiles import CourseError, Hardware, Plan, resolve

NAME = "me/llama-3-medquad-qlora"
QUESTION = chat.THREE_QUESTIONS[0]
TALK = [
    {"role": "system", "content": chat.SYSTEM_PROMPT},
    {"role": "user", "content": "What is gout?"},
    {"role": "assistant", "content": "Gout is a kind of arthritis.\nIt hurts."},
    {"role": "user", "content": 'And how is it "treated"?'},
]


@pytest.fixture(scope="module")
def plan(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = resolve("tiny", hardware=Hardware("cpu", "any", 16.0, cores=2), out=str(tmp_path_factory.mktemp("run")))
    shutil.copytree(tiny_adapter, plan.folder / "adapter")
    return plan


@pytest.fixture(scope="module")
def folder(plan: Plan) -> Path:
    return publishing.build(plan, NAME, plan.folder / "published")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[serving.Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", serving.HOST)
        running = serving.start(folder)
        yield running
        running.stop()


@pytest.fixture(scope="module")
def client(server: serving.Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.address, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    """``messages, n -> (text, prompt tokens)``: the first n tokens as transformers writes them here, from the same folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def answer(messages: list[dict[str, str]], most: int) -> tuple[str, int]:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        count = encoded["input_ids"].shape[1]
        ids = model.generate(**encoded, max_new_tokens=most)[0, count:]
        return tokenizer.decode(ids, skip_special_tokens=True), count

    return answer


# ---- the real server ------------------------------------------------------------------------------------------------


def test_the_openai_client_gets_the_models_own_answer_in_one_piece_and_streamed(
    server: serving.Server, client: openai.OpenAI, expected: Any
) -> None:
    messages = chat.prompt_messages(QUESTION)
    text, count = expected(messages, 16)
    assert server.model == "published" and text
    whole = client.chat.completions.create(model=server.model, messages=messages, max_tokens=16)
    assert whole.choices[0].message.content == text
    assert whole.usage.prompt_tokens == count, "one BOS, the system prompt and the question, and nothing else"
    pieces = list(serving.stream(client, server.model, messages, max_tokens=16))
    assert "".join(pieces) == text and len(pieces) > 3


def test_several_turns_reach_the_model_as_the_template_writes_them(
    server: serving.Server, client: openai.OpenAI, expected: Any, plan: Plan
) -> None:
    text, count = expected(TALK, 12)
    answer = client.chat.completions.create(model=server.model, messages=TALK, max_tokens=12)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (text, count)
    assert count == len(chat.prompt_ids(generation.load_tokenizer(plan), TALK))
    alone = client.chat.completions.create(model=server.model, messages=TALK[-1:], max_tokens=12)
    assert alone.usage.prompt_tokens < count, "the server remembers nothing and adds no system prompt"


def test_a_generation_config_without_the_end_of_turn_runs_on(server: serving.Server, client: openai.OpenAI, folder: Path) -> None:
    right = json.loads((folder / "generation_config.json").read_text())
    messages = chat.prompt_messages(QUESTION)
    free = client.chat.completions.create(model=server.model, messages=messages, max_tokens=3).usage.completion_tokens
    assert free == 3
    first = openai_first_token(client, server.model, messages)
    for ends, tokens, reason in (([first], 1, "stop"), ([], 3, "length")):
        config = json.dumps(right | {"eos_token_id": ends or None, "max_new_tokens": 3})
        answer = client.chat.completions.create(model=server.model, messages=messages, extra_body={"generation_config": config})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (tokens, reason)


def openai_first_token(client: openai.OpenAI, model: str, messages: Any) -> int:
    """The id of the first token of the answer, found by trying which end of text stops at once."""
    tokenizer = generation.load_tokenizer(resolve("tiny", hardware=Hardware("cpu", "any", 16.0, cores=2)))
    text = client.chat.completions.create(model=model, messages=messages, max_tokens=1).choices[0].message.content
    (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(token)


def test_a_request_for_another_model_is_refused_in_one_line(server: serving.Server, client: openai.OpenAI) -> None:
    with pytest.raises(CourseError, match=r"refused the request \(400 .*pinned to 'published'") as error:
        list(serving.stream(client, "another", chat.prompt_messages(QUESTION)))
    assert "\n" not in str(error.value)


def test_a_port_in_use_is_said_before_a_model_is_loaded(server: serving.Server, folder: Path) -> None:
    port = int(re.search(r":(\d+)/", server.address).group(1))
    with pytest.raises(CourseError, match=f"port {port} is in use"):
        serving.start(folder, port)


def test_a_server_that_dies_in_mid_stream_is_one_message_and_nothing_that_came_is_lost(folder: Path) -> None:
    server = serving.start(folder)
    client = openai.OpenAI(base_url=server.address, api_key="none", max_retries=0)
    endless = json.dumps({"eos_token_id": None, "max_new_tokens": 900})
    pieces = []
    with pytest.raises(CourseError, match="went away in the middle of an answer, after") as error:
        for piece in serving.stream(client, server.model, chat.prompt_messages(QUESTION), extra_body={"generation_config": endless}):
            pieces.append(piece)
            if len(pieces) == 2:
                server.process.kill()
    assert len(pieces) >= 2 and "\n" not in str(error.value)
    assert server.stop() != 0
    with pytest.raises(CourseError, match=r"does not answer .*: start it"):
        list(serving.stream(client, server.model, chat.prompt_messages(QUESTION)))


# ---- a server that fails --------------------------------------------------------------------------------------------


def test_what_is_no_whole_model_is_not_served(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(CourseError, match=r"adapter/ holds an adapter without its base: .* --merged"):
        serving.start(plan.folder / "adapter")
    with pytest.raises(CourseError, match="holds no model"):
        serving.start(tmp_path)


def test_a_server_that_cannot_start_says_its_last_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho Loading\necho 'ValueError: no luck' >&2\necho\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    with pytest.raises(CourseError, match=r"ended before it answered \(ValueError: no luck\). All it said is in serve\.log"):
        serving.start(folder)
    assert (folder.parent / "serve.log").read_text().startswith("Loading")


def test_a_server_that_is_too_slow_is_ended(folder: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(CourseError, match=r"did not answer within 0 s and was ended"):
        serving.start(folder, patience=0)
    assert {child.pid for child in psutil.Process().children()} == before


def chunk(text: str | None, reason: str | None = None) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return "data: " + json.dumps({"id": "1", "created": 0, "model": "m", "object": "chat.completion.chunk", "choices": [choice]}) + "\n\n"


@pytest.fixture
def answering() -> Iterator[tuple[openai.OpenAI, list[str]]]:
    """A client, and the list of what its server sends before it closes the connection; "cut" breaks off inside the body."""
    script: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *given: Any) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for text in script:
                if text == "cut":
                    break
                self.wfile.write(f"{len(text.encode()):x}\r\n{text}\r\n".encode())
            else:
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

    hub = http.server.ThreadingHTTPServer((serving.HOST, 0), Handler)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", serving.HOST)
        yield openai.OpenAI(base_url=f"http://{serving.HOST}:{hub.server_address[1]}/v1", api_key="none", max_retries=0), script
    hub.shutdown()
    hub.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("sent", "pieces", "message"),
    [
        ([chunk("A"), chunk("B"), chunk(None, "stop")], 2, ""),
        ([chunk("A"), chunk("B", "length")], 2, ""),
        ([chunk("A"), chunk("B"), "cut"], 2, r"after 2 pieces \(Connection error"),
        ([chunk("A")], 1, r"after 1 pieces \(the stream ended without a finish_reason"),
        ([chunk("A"), 'data: {"error": "out of memory"}\n\n'], 1, "after 1 pieces"),
        ([chunk("A"), 'data: {"id": "1", "choi', "cut"], 1, "after 1 pieces"),
        (["cut"], 0, r"does not answer \(Connection error"),
    ],
)
def test_every_way_in_which_a_stream_breaks_off_is_noticed(
    answering: tuple[openai.OpenAI, list[str]], sent: list[str], pieces: int, message: str
) -> None:
    client, script = answering
    script += sent
    came: list[str] = []
    if not message:
        assert list(serving.stream(client, "m", TALK)) == ["A", "B"]
        return
    with pytest.raises(CourseError, match=message) as error:
        for piece in serving.stream(client, "m", TALK):
            came.append(piece)
    assert len(came) == pieces and "\n" not in str(error.value)


def test_the_line_for_a_terminal_and_a_free_port() -> None:
    assert serving.command("my model", 8000, ["--device", "cpu"]) == (
        "transformers serve 'my model' --host 127.0.0.1 --port 8000 --device cpu"
    )
    with socket.socket() as taken:
        taken.bind((serving.HOST, serving.free_port()))


def test_the_options_are_those_of_the_installed_transformers() -> None:
    import inspect

    from transformers.cli.serve import Serve

    known = set(inspect.signature(Serve.__init__).parameters)
    used = {o.removeprefix("--").replace("-", "_") for o in serving.command("m", 1).split() if o.startswith("--")}
    assert used == {"host", "port"} and used | {"force_model", "quantization", "device"} <= known


# ---- Ollama ---------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nHello.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = "{{ bos_token }}Today: 26 Jul 2024\n{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the little that we use of it: one range over the messages, two fields."""
    before, turn, after = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*?)\{\{ end \}\}(.*)", template, re.DOTALL).groups()
    assert "{{" not in before + after
    made = []
    for message in messages:
        fields = {".Role": message["role"], ".Content": message["content"]}
        made.append(re.sub(r"\{\{ (\.\w+) \}\}", lambda field, fields=fields: fields[field.group(1)], turn))
    return before + "".join(made) + after


@pytest.fixture
def tokenizer(plan: Plan) -> Any:
    return generation.load_tokenizer(plan)


@pytest.mark.parametrize("template", ["", CHATML])
def test_ollamas_template_writes_what_the_tokenizer_writes(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    made = serving.go_template(tokenizer)
    for talk in (TALK, TALK[:2], [*TALK, {"role": "assistant", "content": "Rest."}, {"role": "user", "content": "{{ .Role }}?"}]):
        own = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert go(made, talk) == own.removeprefix(tokenizer.bos_token)
        assert own.startswith(tokenizer.bos_token) != bool(template), "Ollama puts the one BOS before it"


def test_the_modelfile_carries_template_stops_and_system_prompt(tokenizer: Any, tmp_path: Path) -> None:
    path = serving.write_modelfile(tokenizer, tmp_path / "merged", 64)
    text = path.read_text()
    assert path == tmp_path / "Modelfile" and text.startswith("FROM ./merged\n")
    assert re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE).group(1) == serving.go_template(tokenizer)
    assert re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE) == ["<|end_of_text|>", "<|eot_id|>"]
    assert f'\nSYSTEM """{chat.SYSTEM_PROMPT}"""\n' in text and "PARAMETER num_predict 64\n" in text


@pytest.mark.parametrize(
    ("template", "message"), [(DATED, "not one form for every turn"), (STRICT, "does not render a plain conversation")]
)
def test_a_template_that_has_no_such_form_is_refused(tokenizer: Any, template: str, message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(CourseError, match=message):
        serving.go_template(tokenizer)


def test_stopping_ends_that_process_and_the_port_is_free_again(server: serving.Server) -> None:
    """The last test: the server of the tests above ends."""
    number, port = server.process.pid, int(server.address.split(":")[2].split("/")[0])
    assert psutil.pid_exists(number)
    server.stop()
    assert not psutil.pid_exists(number) and server.process.returncode is not None
    with socket.socket() as probe:
        assert probe.connect_ex((serving.HOST, port)) != 0
    assert server.stop() == server.process.returncode, "once more changes nothing"
