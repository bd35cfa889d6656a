"""A published model behind the OpenAI API, and Ollama's template beside the tokenizer's own."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import psutil
import pytest
from conftest import tiny
from transformers import AutoModelForCausalLM

from medquad_utils import CourseError, chat, publishing, serving
from medquad_utils.profiles import TINY_MODEL

ASKED = chat.prompt_messages(chat.THREE_QUESTIONS[0])
TALK = [
    *chat.prompt_messages("What is gout?"),
    {"role": "assistant", "content": "Gout is a kind of arthritis.\nIt hurts."},
    {"role": "user", "content": 'And how is it "treated"?'},
]


@pytest.fixture(scope="module")
def server(trained_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running server of the published model of tiny, with a client."""
    here = tmp_path_factory.mktemp("run")
    folder = publishing.build(tiny(here), "me/tiny", here / "published", adapter=trained_adapter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", serving.HOST)
        running = serving.start(folder)
        running.client = openai.OpenAI(base_url=running.address, api_key="none", max_retries=0)
        yield running
        running.stop()


@pytest.mark.full
@pytest.mark.parametrize("talk", [ASKED, TALK], ids=["one turn", "several turns"])
def test_the_server_gives_the_models_answer(server: Any, talk: Any, tiny_tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(server.log.with_name("published"))
    settings = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    encoded = tiny_tokenizer.apply_chat_template(talk, **settings)
    count = encoded["input_ids"].shape[1]
    made = model.generate(**encoded, max_new_tokens=99)[0, count:]
    text = tiny_tokenizer.decode(made, skip_special_tokens=True)
    create = server.client.chat.completions.create
    whole = create(model=server.model, messages=talk, max_tokens=99)
    assert whole.choices[0].message.content == text
    assert whole.usage.prompt_tokens == count, "one BOS, one system turn, and nothing else"
    assert talk != ASKED or whole.choices[0].finish_reason == "stop"
    pieces = list(serving.stream(server.client, server.model, talk, max_tokens=99))
    assert "".join(pieces) == text and len(pieces) > 3


@pytest.mark.full
def test_a_server_that_refuses_or_dies_is_one_message(server: Any) -> None:
    with pytest.raises(CourseError, match=r"^the server refused the request \(400 .*another.*$"):
        list(serving.stream(server.client, "another", ASKED))
    endless = {"generation_config": json.dumps({"eos_token_id": None, "max_new_tokens": 900})}
    pieces = serving.stream(server.client, server.model, ASKED, extra_body=endless)
    assert next(pieces)
    server.process.kill()
    with pytest.raises(CourseError, match=r"^[^\n]*broke off after [1-9]\d* pieces[^\n]*$"):
        list(pieces)
    assert server.stop() != 0
    with pytest.raises(CourseError, match=r"after 0 pieces .* Start the server"):
        list(serving.stream(server.client, server.model, ASKED))


def test_a_stream_without_its_end_is_not_taken_for_a_whole_answer() -> None:
    choices = [SimpleNamespace(delta=SimpleNamespace(content="A"), finish_reason=None)]
    create = lambda **_: iter([SimpleNamespace(choices=choices)])  # noqa: E731
    client: Any = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    with pytest.raises(CourseError, match=r"after 1 pieces \(the stream ended without a finish"):
        list(serving.stream(client, "m", ASKED))


def test_what_cannot_be_served_is_refused(trained_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CourseError, match=r"holds an adapter without its base: .* --merged"):
        serving.start(trained_adapter)
    with pytest.raises(CourseError, match="holds no model"):
        serving.start(tmp_path)
    taken = socket.create_server((serving.HOST, 0))
    with taken, pytest.raises(CourseError, match="is in use"):
        serving.start(TINY_MODEL, taken.getsockname()[1])


def test_this_process_frees_the_card_before_another_one_loads(
    tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "README.md").write_text("```python\nload\n```\n")
    order: list[str] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: order.append("free"))

    def started(*_: Any, **__: Any) -> Any:
        order.append("start")
        raise OSError

    for name in ("Popen", "run"):
        monkeypatch.setattr(f"subprocess.{name}", started)
    for begin in (serving.start, lambda folder: publishing.run_snippet(folder, "me/x")):
        with pytest.raises(OSError):
            begin(tmp_path)
    assert order == ["free", "start"] * 2


def test_a_server_that_does_not_start_is_ended(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "python").write_text("#!/bin/sh\necho 'ValueError: no luck' >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(CourseError, match=r"ended .* \(ValueError: no luck\)"):
        serving.start(tmp_path / "model")
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    before = set(psutil.Process().children())
    with pytest.raises(CourseError, match="did not answer within 0 s and was ended"):
        serving.start(tmp_path / "model", patience=0)
    assert set(psutil.Process().children()) <= before


def test_ollamas_template_is_the_tokenizers(tiny_tokenizer: Any, tmp_path: Path) -> None:
    text = serving.write_modelfile(tiny_tokenizer, tmp_path / "merged", 64).read_text()
    made = text.split('"""')[1]
    (head, rest), tail = made.split("{{ range .Messages }}"), made.split("{{ end }}")[1]
    turn = rest.split("{{ end }}")[0]
    for talk in (TALK, TALK[:2]):
        own = tiny_tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        turns = [
            turn.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
            for m in talk
        ]
        assert tiny_tokenizer.bos_token + head + "".join(turns) + tail == own
    assert text.startswith(f'FROM ./merged\nTEMPLATE """{made}"""\n')
    assert all(f'\nPARAMETER stop "{end}"\n' in text for end in ("<|end_of_text|>", "<|eot_id|>"))
    assert f'\nSYSTEM """{chat.SYSTEM_PROMPT}"""\n' in text
