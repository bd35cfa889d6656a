"""What goes to the Hub: the folder, the card and its snippet, the licences, the last look, and the push against a Hub on loopback."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from medquad_utils import cli, model_card, publishing
from medquad_utils.chat import SYSTEM_PROMPT
from medquad_utils.profiles import TINY_MODEL, CourseError, Hardware, Plan, resolve

REPO = Path(__file__).parent.parent
NAME = "me/llama-3-medquad-qlora"
MACHINE = Hardware("cpu", "any", 16.0, cores=2)
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub 2.4 to httpx2
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def plan(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A run of tiny with an adapter of random weights and the metrics that its lessons would leave."""
    plan = resolve("tiny", hardware=MACHINE, out=str(tmp_path_factory.mktemp("run")))
    shutil.copytree(tiny_adapter, plan.folder / "adapter")
    trained = json.loads((tiny_adapter / "plan.json").read_text())
    digest = hashlib.sha256((tiny_adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]
    write(plan.folder / "metrics" / "train.json", {"steps": 4321, "rows": 12, "seconds": 98.7, "plan": trained})
    write(plan.folder / "metrics" / "explore.json", {"rows_loaded": 77777, "sizes": {"train": 5, "validation": 6, "test": 7}})
    scores = {"rougeL": {"mean": 0.4321, "low": 0.3333, "high": 0.5556, "n": 9}, "bleu": {"mean": 0.25, "low": None, "high": None, "n": 3}}
    safety = {"overall": {"passed": 3, "n": 8, "share": 0.375, "ci95": [0.1, 0.7]}}
    evaluation = {
        "recipe": {"adapter": digest}, "questions": 9, "held_out": True,
        "overall": {"arms": {"base": {}, "tuned": scores, "nearest": {"rougeL": {"mean": 0.3, "low": 0.2, "high": 0.4}}}},
        "safety": {"prompts": 8, "base": safety, "tuned": safety},
        "verdict": [{"score": "rougeL", "beats": ["nearest"], "even": [], "loses": []}],
    }  # fmt: skip
    write(plan.folder / "evaluation" / "metrics.json", evaluation)
    return plan


def write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def published(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny, at the relative path that its repository has on the Hub."""
    return publishing.build(plan, NAME, tmp_path_factory.mktemp("hub") / NAME)


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "folder"))


@pytest.fixture(scope="module")
def adapter_of_the_hub(tiny_adapter: Path, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, Path]:
    """A plan whose base is on the Hub, its adapter, and a working folder in which the base's id is the embedded model's folder."""
    here = tmp_path_factory.mktemp("elsewhere")
    hub = dataclasses.replace(plan, profile="small", model_id="somebody/a-base", revision=COMMIT)
    (here / "somebody").mkdir()
    (here / "somebody" / "a-base").symlink_to(TINY_MODEL)
    adapter = Path(shutil.copytree(tiny_adapter, here / "adapter"))
    (adapter / "plan.json").write_text(json.dumps(hub.as_dict()))
    return hub, adapter, here


# ---- the folder and the card ----------------------------------------------------------------------------------------


def test_the_folder_of_tiny_is_a_whole_model(published: Path) -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {p.name for p in published.iterdir()} == names | {"README.md", "LICENSE", "NOTICE"}
    ends = json.loads((published / "generation_config.json").read_text())
    ids = {t["content"]: t["id"] for t in json.loads((published / "tokenizer.json").read_text())["added_tokens"]}
    assert set(ends["eos_token_id"]) == {ids["<|end_of_text|>"], ids["<|eot_id|>"]}
    assert ends["pad_token_id"] not in ends["eos_token_id"]
    assert "Apache License" in (published / "LICENSE").read_text()
    assert [p.name for p in published.parent.iterdir()] == [published.name]


def test_the_card_holds_every_section_and_the_numbers_of_the_run(published: Path) -> None:
    from huggingface_hub import ModelCard

    text = (published / "README.md").read_text()
    headings = re.findall(r"^##+ (.+)$", text, re.MULTILINE)
    wanted = (
        "Model details; Sources; Direct use; Downstream use; Out-of-scope use; Bias, risks and limitations; Recommendations; "
        "How to get started; Data and split; Known defects of the data; Training procedure; Hardware and time; Results; "
        "Safety, before and after; Licence and attribution; Citation"
    )
    for section in wanted.split("; "):
        assert section in headings
    for number in (
        "4,321",
        "98.700",
        "77,777",
        "5 / 6 / 7",
        r"0.432 \[0.333, 0.556\]",
        r"0.300 \[0.200, 0.400\]",
        r"3 of 8: 0.375 \[0.100, 0.700\]",
    ):
        assert number in text
    assert "BMC Bioinformatics 2019, 20:511" in text and "10.1186/s12859-019-3119-4" in text
    assert "| ROUGE-L (up) | not measured | " in text, "the base was not scored"
    card = ModelCard(text)
    rouge, bleu = card.data.eval_results
    assert (rouge.metric_name, rouge.metric_value, rouge.metric_args) == ("ROUGE-L", 0.4321, {"interval_95": [0.3333, 0.5556]})
    assert (bleu.metric_value, bleu.metric_args) == (0.25, None)
    index = yaml.safe_load(text.split("---")[1])["model-index"]
    assert index[0]["name"] == "llama-3-medquad-qlora" and len(index[0]["results"][0]["metrics"]) == 2
    assert card.data.license == "apache-2.0" and card.data.base_model is None


def test_what_was_not_measured_says_so(plan: Plan, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    bare = dataclasses.replace(plan, out=str(tmp_path))
    shutil.copytree(plan.folder / "adapter", bare.folder / "adapter")
    metrics = model_card.read_metrics(bare, bare.folder / "adapter")
    assert metrics.notes == ("no metrics of the training", "no metrics of the data", "no metrics of the evaluation")
    text = model_card.card(NAME, bare, metrics, True, "")
    for line in (
        "| steps | not measured |",
        "| seconds of training | not measured |",
        "Questions: not measured (not measured)",
        "| ROUGE-L (up) | not measured | not measured | not measured | not measured |",
        "| overall | not measured | not measured |",
    ):
        assert line in text
    assert "–" not in text and "None" not in text
    assert ModelCard(text).data.get("model-index") is None and ModelCard(text).data.eval_results is None
    write(
        bare.folder / "metrics" / "evaluate.json", {"rougeL_tuned": 0.61, "rougeL_another_disease": 0.12, "questions": 5, "held_out": False}
    )
    text = model_card.card(NAME, bare, model_card.read_metrics(bare, bare.folder / "adapter"), True, "")
    assert "| ROUGE-L (up) | not measured | 0.610 | not measured | 0.120 |" in text and "not held out" in text


def test_numbers_of_another_adapter_or_training_are_left_out(plan: Plan, tmp_path: Path) -> None:
    other = dataclasses.replace(plan, out=str(tmp_path))
    shutil.copytree(plan.folder, other.folder)
    weights = other.folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    write(other.folder / "metrics" / "train.json", {"steps": 4321, "plan": {"seed": 99}})
    metrics = model_card.read_metrics(other, other.folder / "adapter")
    assert metrics.evaluation == {} and metrics.train == {}
    assert metrics.notes[:2] == ("metrics/train.json is of another training", "evaluation/metrics.json is of another adapter")


def test_the_snippets_of_both_cards_run_verbatim_in_a_fresh_process(
    published: Path, adapter_of_the_hub: tuple[Plan, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, adapter, here = adapter_of_the_hub
    monkeypatch.chdir(here)
    other = publishing.build(hub, "me/an-adapter", here / "me" / "an-adapter", adapter=adapter)
    config = json.loads((other / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("somebody/a-base", COMMIT)
    assert COMMIT in (other / "README.md").read_text() and "base_model: somebody/a-base" in (other / "README.md").read_text()
    assert "base_model_relation: adapter" in (other / "README.md").read_text()
    assert len(json.loads((other / "generation_config.json").read_text())["eos_token_id"]) == 2
    (here / NAME).symlink_to(published)
    codes = [re.search(r"```python\n(.*?)```", (f / "README.md").read_text(), re.DOTALL).group(1) for f in (published, other)]
    assert "quantization_config=" in codes[1] and "quantization_config" not in codes[0]
    assert all(SYSTEM_PROMPT in code for code in codes)
    for number, code in enumerate(codes):
        (tmp_path / f"{number}.py").write_text(code)
    both = "import runpy, sys\nfor file in sys.argv[1:]:\n    runpy.run_path(file)\n    print('next')\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", both, str(tmp_path / "0.py"), str(tmp_path / "1.py")]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    merged, adapted = done.stdout.split("next\n")[:2]
    assert merged.strip() and adapted.strip()


def test_an_older_folder_is_replaced_whole_and_a_strange_one_is_left_alone(plan: Plan, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    monkeypatch.setattr(publishing, "_write_model", lambda *given: shutil.copytree(copy, given[-1]))
    monkeypatch.setattr(publishing, "card", lambda *given: "no card")
    with pytest.raises(CourseError, match=r"README\.md is no card"):
        publishing.build(plan, NAME, copy)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before and len(list(copy.parent.iterdir())) == 1
    (copy / "thesis.docx").write_text("mine")
    with pytest.raises(CourseError, match=r"in use: it holds thesis\.docx"):
        publishing.build(plan, NAME, copy)


# ---- names and licences ---------------------------------------------------------------------------------------------

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.mark.parametrize("name", ["llama-3-medquad", "Llama-3-x", "LLAMA-3.2-x", "Llama3-x", "llama_3"])
def test_names_that_the_licence_of_llama_allows(name: str) -> None:
    publishing.check_name(f"me/{name}", LLAMA)


@pytest.mark.parametrize("name", ["Meta-Llama-3-medquad", "medquad-llama-3", "my-llama", "llama-2-x"])
def test_names_that_the_licence_of_llama_does_not_allow(name: str) -> None:
    with pytest.raises(CourseError, match="begin with 'Llama 3'"):
        publishing.check_name(f"me/{name}", LLAMA)
    publishing.check_name(f"me/{name}", "HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize("repo", ["name", "a/b/c", "me/a b", "me/..", "", "me/", "https://huggingface.co/me/x", "me/x.git"])
def test_what_is_no_name_of_a_repository(repo: str) -> None:
    with pytest.raises(CourseError, match="expected USER/NAME"):
        publishing.check_name(repo, "embedded")


@pytest.fixture
def llama(adapter_of_the_hub: tuple[Plan, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, Path]:
    """A plan of the 8 B model, whose base's id is a folder of the embedded model here, and its adapter."""
    _, adapter, _ = adapter_of_the_hub
    plan = dataclasses.replace(adapter_of_the_hub[0], model_id=LLAMA)
    (tmp_path / "meta-llama").mkdir()
    (tmp_path / LLAMA).symlink_to(TINY_MODEL)
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "plan.json").write_text(json.dumps(plan.as_dict()))
    monkeypatch.chdir(tmp_path)
    return plan, Path("adapter")


def test_a_llama_goes_out_with_its_agreement_or_not_at_all(
    llama: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    plan, adapter = llama
    folder = publishing.build(plan, NAME, tmp_path / "out" / "folder", adapter=adapter)
    text, notice, licence = ((folder / name).read_text() for name in ("README.md", "NOTICE", "LICENSE"))
    assert "Built with Meta Llama 3" in text and "license: llama3\n" in text and "must be added" in text
    assert (
        "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved." in notice
    )
    assert "https://llama.meta.com/llama3/license/" in licence and LLAMA in licence
    with pytest.raises(CourseError, match="LICENSE lacks the agreement"):
        publishing.push(folder, NAME, "http://127.0.0.1:9")
    wrong, right = tmp_path / "wrong.txt", tmp_path / "right.txt"
    wrong.write_text("MIT License")
    right.write_text("META LLAMA 3 COMMUNITY\nLICENSE AGREEMENT\n\n(a stand-in for the text)")
    with pytest.raises(CourseError, match=r"wrong\.txt is not the Meta Llama 3 Community License"):
        publishing.build(plan, NAME, folder, adapter=adapter, licence=wrong)
    with pytest.raises(CourseError, match=r"cannot read --licence none\.txt"):
        publishing.build(plan, NAME, folder, adapter=adapter, licence=tmp_path / "none.txt")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repo, name, revision: str(right) if name == "LICENSE.txt" else None
    )
    assert publishing.agreement(plan, COMMIT) == right.read_text(), "found in the cache"
    publishing.build(plan, NAME, folder, adapter=adapter, licence=right)
    assert (folder / "LICENSE").read_text() == right.read_text()
    publishing.check(folder, NAME)
    for name, word, message in (
        ("README.md", "Built with Meta Llama 3", "must say 'Built with Meta Llama 3'"),
        ("NOTICE", "Meta Platforms", "NOTICE hold Meta's line"),
        ("NOTICE", "10.1186/", "must attribute MedQuAD"),
        ("adapter_config.json", COMMIT, "must name the Hub id and the revision"),
    ):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole.replace(word, ""))
        with pytest.raises(CourseError, match=message):
            publishing.check(folder, NAME)
        (folder / name).write_text(whole)
    with pytest.raises(CourseError, match="begin with 'Llama 3'"):
        publishing.check(folder, "me/medquad")


def test_a_base_without_a_known_commit_is_refused(llama: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    unpinned = dataclasses.replace(llama[0], revision=None)
    with pytest.raises(CourseError, match="which commit of meta-llama/Meta-Llama-3-8B-Instruct"):
        publishing.base_revision(unpinned)
    record = tmp_path / "cache" / "models--meta-llama--Meta-Llama-3-8B-Instruct" / "refs" / "main"
    record.parent.mkdir(parents=True)
    record.write_text(COMMIT)
    assert publishing.base_revision(unpinned) == COMMIT


# ---- the last look --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("README.md", "hf_" + "a1B2" * 9, "a token of the Hub"),
        ("config.json", "ghp_" + "a1B2" * 9, "a token of GitHub"),
        ("tokenizer.json", "AKIA" + "A1B2" * 4, "an access key"),
        ("NOTICE", "see /home/ada/runs", r"a local path \(/home/ada\)"),
        ("tokenizer_config.json", '"/content/drive"', r"a local path \(/content/drive\)"),
        ("README.md", r"C:\Users\ada\x", "a local path"),
        ("chat_template.jinja", "made by Lovelace", r"your user name \(lovelace\)"),
        ("pytorch_model.bin", "", r"pytorch_model\.bin does not belong"),
        ("optimizer.pt", "", r"optimizer\.pt does not belong"),
        ("checkpoint-5", None, "checkpoint-5 does not belong"),
        ("trainer_state.json", "{}", r"trainer_state\.json does not belong"),
        ("plan.json", "{}", r"plan\.json does not belong"),
    ],
)
def test_the_last_look_names_the_file(copy: Path, name: str, text: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "lovelace")
    publishing.check(copy, NAME)
    if text is None:
        (copy / name).mkdir()
    else:
        with (copy / name).open("a") as file:
            file.write(text)
    with pytest.raises(CourseError, match=message) as error:
        publishing.check(copy, NAME)
    assert name in str(error.value) and "a1B2" not in str(error.value)


def test_own_tokens_and_remarks_inside_weights_are_found_and_the_users_repository_is_none(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("getpass.getuser", lambda: "me")
    monkeypatch.setenv("HF_TOKEN", "an odd one")
    publishing.check(copy, NAME)
    weights = load_file(copy / "model.safetensors")
    save_file(weights, copy / "model.safetensors", metadata={"made": f"{Path.home() / 'x'} /home/ada/x"})
    with pytest.raises(CourseError, match=r"model\.safetensors holds a (local )?path"):
        publishing.check(copy, NAME)
    save_file(weights, copy / "model.safetensors", metadata={"made": "an odd one"})
    with pytest.raises(CourseError, match=r"model\.safetensors holds your Hub token") as error:
        publishing.check(copy, NAME)
    assert "odd" not in str(error.value)


# ---- a Hub on loopback ----------------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """The parts of the Hub's HTTP API that a push uses, as huggingface_hub calls them; what arrives is kept and noted in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.token = "hf_" + "t" * 34
        self.repos: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.lock = threading.Lock()
        self.commits: list[list[tuple[str, str]]] = []
        self.deny = 0
        self.dies_at = ""  # the step at which it stops answering
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def sha(self) -> str:
        return f"{len(self.commits):040x}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was cut on purpose is no error."""


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *given: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, value: Any = None) -> None:
        data = json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def allowed(self, step: str) -> bool:
        """Note the step; cut the connection or refuse where the test says so."""
        hub = self.server
        if hub.dies_at and hub.dies_at in step:
            self.close_connection = True
            self.connection.close()
            return False
        hub.log.append(step)
        if hub.deny or (not step.startswith("put") and self.headers.get("Authorization") != f"Bearer {hub.token}"):
            self.answer(hub.deny or 401, {"error": "Invalid username or password."})
            return False
        return True

    def do_GET(self) -> None:
        hub, repo = self.server, self.path.removeprefix("/api/models/")
        if not self.allowed(f"info {repo}"):
            return
        files = hub.repos[repo]
        card = yaml.safe_load(files["README.md"].decode().split("---")[1]) if files.get("README.md", b"").startswith(b"---") else None
        self.answer(200, {"id": repo, "sha": hub.sha(), "siblings": [{"rfilename": name} for name in files], "cardData": card})

    def do_PUT(self) -> None:
        data, oid = self.body(), self.path.removeprefix("/put/")
        with self.server.lock:
            if self.allowed(f"put {oid}, {'second' if self.server.blobs else 'first'}"):
                assert hashlib.sha256(data).hexdigest() == oid
                self.server.blobs[oid] = data
                self.answer(200)

    def do_POST(self) -> None:
        hub, data = self.server, self.body()
        step = "yaml" if "validate-yaml" in self.path else next(s for s in ("create", "preupload", "batch", "commit") if s in self.path)
        if not self.allowed(step):
            return
        if step == "commit":
            self.commit([json.loads(line) for line in data.splitlines()])
            return
        asked = json.loads(data)
        if step == "create":
            repo = f"{asked['organization']}/{asked['name']}"
            taken = repo in hub.repos
            hub.repos.setdefault(repo, {".gitattributes": b"*.safetensors filter=lfs"})
            self.answer(
                409 if taken else 200, {"error": "You already created this model repo"} if taken else {"url": f"{hub.address}/{repo}"}
            )
        elif step == "yaml":
            good = isinstance(yaml.safe_load(asked["content"].split("---")[1]), dict)
            self.answer(200 if good else 400, {"warnings": [], "errors": []})
        elif step == "preupload":
            large = {f["path"]: f["path"].endswith((".safetensors", "tokenizer.json")) for f in asked["files"]}
            self.answer(
                200, {"files": [{"path": p, "uploadMode": "lfs" if x else "regular", "shouldIgnore": False} for p, x in large.items()]}
            )
        else:
            send = [(o, {"upload": {"href": f"{hub.address}/put/{o['oid']}"}}) for o in asked["objects"]]
            self.answer(200, {"transfer": "basic", "objects": [o if o["oid"] in hub.blobs else {**o, "actions": a} for o, a in send]})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        hub, repo = self.server, self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        assert lines[0]["key"] == "header"
        if lines[0]["value"].get("parentCommit") != hub.sha():
            self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = hub.repos[repo]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"]) if line["key"] == "file" else hub.blobs[value["oid"]]
        hub.commits.append([(line["key"], line["value"]["path"]) for line in lines[1:]])
        self.answer(200, {"success": True, "commitOid": hub.sha(), "commitUrl": f"{hub.address}/{repo}/commit/{hub.sha()}"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running Hub that knows the token of the environment; nobody waits between two tries."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_push_brings_every_byte_and_the_card_last(hub: Hub, copy: Path) -> None:
    assert publishing.push(copy, NAME, hub.address) == f"{hub.address}/{NAME}"
    (commit,) = hub.commits
    assert commit[-1] == ("file", "README.md") and len(commit) == len(contents(copy))
    assert ("lfsFile", "model.safetensors") in commit
    assert hub.log.index(next(s for s in hub.log if s.startswith("put"))) < hub.log.index("commit")
    assert {n: b for n, b in hub.repos[NAME].items() if n != ".gitattributes"} == contents(copy)
    # once more, with other files: the same repository, in one step, and what is no longer there goes
    hub.repos[NAME]["old.safetensors"] = b"old"
    (copy / "NOTICE").write_text((copy / "NOTICE").read_text() + "More.\n")
    hub.log.clear()
    publishing.push(copy, NAME, hub.address)
    assert {n: b for n, b in hub.repos[NAME].items() if n != ".gitattributes"} == contents(copy)
    assert not [step for step in hub.log if step.startswith("put")], "the weights had arrived"


@pytest.mark.parametrize("step", ["create", "info", "yaml", "preupload", "batch", "first", "second", "commit"])
def test_a_push_that_broke_off_leaves_nothing_half_made_and_goes_on(hub: Hub, copy: Path, step: str) -> None:
    hub.dies_at = step
    before = contents(copy)
    with pytest.raises(CourseError, match=r"out of reach or the connection broke .* folder/ is kept") as error:
        publishing.push(copy, NAME, hub.address)
    assert "\n" not in str(error.value)
    assert set(hub.repos.get(NAME, {})) <= {".gitattributes"}, "empty, not half full"
    assert contents(copy) == before
    arrived, hub.dies_at = dict(hub.blobs), ""
    hub.log.clear()
    publishing.push(copy, NAME, hub.address)
    assert {n: b for n, b in hub.repos[NAME].items() if n != ".gitattributes"} == before
    assert len(arrived) == {"second": 1, "commit": 2}.get(step, 0)
    assert sum(s.startswith("put") for s in hub.log) == 2 - len(arrived), "what has arrived is not sent again"


def test_a_repository_of_somebody_elses_making_is_left_alone(hub: Hub, copy: Path) -> None:
    for theirs in ({"README.md": b"---\ntags: [x]\n---\nMine."}, {"README.md": b"no metadata"}, {"model.safetensors": b"weights, no card"}):
        hub.repos[NAME] = dict(theirs)
        with pytest.raises(CourseError, match=f"{NAME} exists and holds {min(theirs)}, which medquad publish did not put there"):
            publishing.push(copy, NAME, hub.address)
        assert hub.repos[NAME] == theirs and hub.commits == []


def test_each_refusal_is_one_line_that_keeps_the_folder(hub: Hub, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(copy)

    def refusal() -> str:
        with pytest.raises(CourseError) as error:
            publishing.push(copy, NAME, hub.address)
        assert contents(copy) == before and "\n" not in str(error.value) and "is kept" in str(error.value)
        return str(error.value)

    for status, words in ((403, "the token may not write to"), (401, "does not know the token"), (418, "the Hub refused")):
        hub.deny = status
        assert words in refusal()
    hub.deny = 0
    monkeypatch.setattr(Hub, "sha", lambda self: f"{len(self.log):040x}")  # somebody commits between our look and our commit
    assert "changed by somebody else" in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "w" * 34)
    assert "does not know the token" in refusal()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(publishing, "hub_token", lambda: None)
    assert "no Hub token" in refusal()
    monkeypatch.setattr(publishing, "hub_token", lambda: hub.token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal()


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_builds_and_a_dry_run_sends_nothing(
    plan: Plan, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.setenv("MEDQUAD_OUT", plan.out)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr(publishing, "_write_model", lambda *given: shutil.copytree(copy, given[-1]))  # merged once, above
    given = ["publish", "--profile", "tiny", "--repo", NAME, "--out", str(tmp_path / "out")]
    assert cli.main([*given, "--dry-run"]) == 0
    assert "nothing was sent" in capsys.readouterr().out and hub.log == []
    assert contents(tmp_path / "out") == contents(copy)
    assert cli.main(given) == 0
    assert f"published: {hub.address}/{NAME}" in capsys.readouterr().out
    assert hub.repos[NAME]["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    assert cli.main([*given[:-3], "no-name"]) == 1
    assert capsys.readouterr().err == (
        "medquad: --repo 'no-name': expected USER/NAME, of letters, digits, '-', '_' and '.', for example me/my-model.\n"
    )
    monkeypatch.setenv("MEDQUAD_OUT", str(tmp_path / "nothing"))
    assert cli.main(given) == 1
    assert "no adapter in adapter/: lesson 04 trains one" in capsys.readouterr().err


# ---- serving what was published -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": [1]}, r"does not stop at <\|eot_id\|>"),
        ({"eos_token_id": 4}, r"does not stop at <\|end_of_text\|>"),
        ({"pad_token_id": 4}, "must pad with a token that ends nothing"),
        ({"pad_token_id": None}, "must pad with a token that ends nothing"),
    ],
)
def test_a_generation_config_that_never_stops_is_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    publishing.check(copy, NAME)
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CourseError, match=message):
        publishing.check(copy, NAME)


def test_a_typed_number_in_the_card_is_found_and_words_are_free(plan: Plan, copy: Path) -> None:
    publishing.check_numbers(plan, NAME, copy)
    card = copy / "README.md"
    text = card.read_text()
    card.write_text(text.replace("## Uses\n", "## Uses\n\nWritten with love.\n") + "\nWe like it.\n")
    publishing.check_numbers(plan, NAME, copy)
    for typed in (text.replace("0.432", "0.932"), text + "\nIt is right 99 % of the time.\n", text.replace("| 4,321 |", "| 4,322 |")):
        assert typed != text
        card.write_text(typed)
        with pytest.raises(CourseError, match=r"README\.md line \d+ holds a number that no metric of the run gives"):
            publishing.check_numbers(plan, NAME, copy)


def test_the_snippet_of_a_card_is_read_and_a_broken_one_says_its_last_line(copy: Path) -> None:
    assert publishing.snippet_of(copy).startswith("from transformers import")
    card = copy / "README.md"
    text = card.read_text()
    seen = "import pathlib\nprint(sorted(p.name for p in pathlib.Path('me').glob('*/config.json')), pathlib.Path('me/x').exists())\n"
    card.write_text(re.sub(r"```python\n.*?```", lambda _: f"```python\n{seen}```", text, count=1, flags=re.DOTALL))
    assert publishing.run_snippet(copy, NAME) == "['config.json'] False"
    card.write_text(re.sub(r"```python\n.*?```", "```python\nraise ValueError('no\\\\nluck')\n```", text, count=1, flags=re.DOTALL))
    with pytest.raises(CourseError, match=r"the snippet of the card in folder/ fails: luck$"):
        publishing.run_snippet(copy, NAME)
    card.write_text("no code")
    with pytest.raises(CourseError, match="shows no Python code"):
        publishing.snippet_of(copy)
