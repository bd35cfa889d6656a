"""Every keyword that the package and the notebooks pass to a library, looked up in the library that is installed.

Libraries rename: a lesson that ran last month then ends in a ``TypeError`` after minutes of training, or, worse, a keyword
goes into ``**kwargs`` and is ignored. Each test says which outage it prevents.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import openai
import papermill
import peft
import pytest
import torch
import transformers
import trl
from nbconvert import HTMLExporter
from papermill.clientwrap import PapermillNotebookClient

from medquad_utils.profiles import TINY_MODEL

REPO = Path(__file__).parent.parent
FILES = [
    *sorted((REPO / "medquad_utils").rglob("*.py")),
    *sorted((REPO / "notebooks").glob("*.ipynb")),
    *sorted((REPO / "notebooks" / "solutions").glob("*.ipynb")),
]


def unnamed_outages(source: str) -> list[str]:
    """Tests whose docstring does not begin with the outage that they prevent, and name the lesson that it would stop."""
    tests = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    said = re.compile(r"Outage: .*?\b(lessons? 0\d|any lesson)\b", re.DOTALL)
    return [n.name for n in tests if not said.match(ast.get_docstring(n) or "")]


def test_every_test_here_names_the_outage_that_it_prevents() -> None:
    """Outage: lesson 04 stops, the weekly run says that a signature test failed, and nobody knows what that means for a learner."""
    assert unnamed_outages(Path(__file__).read_text(encoding="utf-8")) == []
    wrong = 'def test_a(): ...\ndef test_b():\n    """Outage: something."""\ndef test_c():\n    """Outage: lesson 04 stops."""\n'
    assert unnamed_outages(wrong) == ["test_a", "test_b"]


# ---- what the code asks for -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """One call with keywords: the dotted name of what is called, or ``.method`` for a method of an object."""

    target: str
    keywords: tuple[str, ...]
    line: str


@cache
def tree(path: Path) -> ast.Module:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [c for c in json.loads(source)["cells"] if c["cell_type"] == "code"]
        source = re.sub(r"^(\s*)[%!].*$", r"\1pass", "\n".join("".join(c["source"]) for c in cells), flags=re.MULTILINE)
    return ast.parse(source)


def imported(path: Path) -> dict[str, str]:
    """Local name -> dotted name of everything that ``path`` imports from outside the standard library."""
    names = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for a in node.names:
                names[a.asname or a.name.split(".")[0]] = a.name if a.asname else a.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return {k: v for k, v in names.items() if v.split(".")[0] not in sys.stdlib_module_names}


def dict_keys(node: ast.expr) -> list[str]:
    """Keys that are written out in a dict, or in dicts joined by ``|``."""
    if isinstance(node, ast.BinOp):
        return dict_keys(node.left) + dict_keys(node.right)
    return [k.value for k in node.keys if isinstance(k, ast.Constant)] if isinstance(node, ast.Dict) else []


def calls(path: Path) -> Iterator[Call]:
    """Every call in ``path`` that passes keywords, a ``**name`` of a dict that is written out in the file included."""
    names = imported(path)
    dicts: list[tuple[str, int, list[str]]] = [
        (target.id, node.lineno, dict_keys(node.value))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]

    def splatted(value: ast.expr, line: int) -> list[str]:
        """Keys of ``**value``: of the dict itself, or of the last one that was given its name above."""
        if not isinstance(value, ast.Name):
            return dict_keys(value)
        return max(((n, keys) for name, n, keys in dicts if name == value.id and n < line), default=(0, []))[1]

    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        keywords = [k.arg for k in node.keywords if k.arg]
        for splat in (k.value for k in node.keywords if k.arg is None):
            keywords += splatted(splat, node.lineno)
        parts, root = [], node.func
        while isinstance(root, ast.Attribute):
            parts, root = [root.attr, *parts], root.value
        if isinstance(root, ast.Name) and root.id in names:
            target = ".".join([names[root.id], *parts])
        elif parts:
            target = "." + parts[-1]
        else:
            target = f"{root.id}()" if isinstance(root, ast.Name) else ""
        if keywords and target:
            yield Call(target, tuple(keywords), f"{path.name}: {ast.unparse(node)[:120]}")


# ---- what the installed libraries take ------------------------------------------------------------------------------


def resolve(dotted: str) -> Any:
    """The object that a dotted name stands for, modules imported on the way."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ImportError(dotted)


def taken(function: Callable[..., Any]) -> set[str]:
    """Names that a function takes: those of its signature, and those it takes out of its ``**kwargs``.

    A built-in function without a signature is read in its own documentation.
    """
    owners = [c.__init__ for c in function.__mro__ if "__init__" in vars(c)] if inspect.isclass(function) else [function]
    names: set[str] = set()
    for number, owner in enumerate([function, *owners]):
        try:
            parameters = inspect.signature(owner).parameters
        except (TypeError, ValueError):
            names |= set(re.findall(r"\b(\w+)(?:: [\w.]+)? ?=", function.__doc__ or "")) if number == 0 else set()
            continue
        names |= {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
        try:
            names |= set(re.findall(r'kwargs\.(?:pop|get|setdefault)\(\s*"(\w+)"', inspect.getsource(owner)))
        except (OSError, TypeError):
            continue
    return names


GENERATION = set(vars(transformers.GenerationConfig())) | taken(transformers.GenerationMixin.generate) | {"input_ids", "attention_mask"}
SFT_FIELDS = {f.name for f in dataclasses.fields(trl.SFTConfig)}
MODEL_LOADING = taken(transformers.PreTrainedModel.from_pretrained)
TOKENIZER_LOADING = taken(transformers.PreTrainedTokenizerBase.from_pretrained)

# What passes its keywords on: the names that the last receiver takes.
PASSED_ON: dict[str, set[str]] = {
    "transformers.AutoModelForCausalLM.from_pretrained": MODEL_LOADING,
    "transformers.AutoTokenizer.from_pretrained": TOKENIZER_LOADING | taken(transformers.RobertaTokenizer),
    "transformers.TextIteratorStreamer": taken(transformers.PreTrainedTokenizerBase.decode),
    "transformers.AutoModel.from_pretrained": MODEL_LOADING,
    "nbconvert.HTMLExporter": set(HTMLExporter.class_trait_names()),
    "papermill.execute_notebook": {"config"} & set(PapermillNotebookClient.class_trait_names()),
    "medquad_utils.training.build_trainer": SFT_FIELDS,
    "medquad_utils.specialising.ensure": SFT_FIELDS,
    "medquad_utils.generation.generate": GENERATION,
    "medquad_utils.generation.ask": GENERATION | {"batch_size", "progress"},
    "medquad_utils.serving.stream": taken(openai.resources.chat.completions.Completions.create),
    # Of the Space's own settings (hf.co/docs/hub/spaces-config-reference); the class keeps whatever it does not know.
    "huggingface_hub.SpaceCardData": {"emoji", "colorFrom", "colorTo", "suggested_hardware", "pinned"},
    "medquad_utils.plots.figure": set(inspect.signature(resolve("matplotlib.figure.Figure.subplots")).parameters),
}

# Methods of objects, by the name of the method, and calls of objects, by the name that the course gives them.
TOKENIZER = transformers.PreTrainedTokenizerBase
METHODS: dict[str, set[str]] = {
    ".apply_chat_template": taken(TOKENIZER.apply_chat_template),
    ".generate": GENERATION,
    ".decode": taken(TOKENIZER.decode) | taken(transformers.PreTrainedTokenizerFast._decode),
    ".train": taken(transformers.Trainer.train),
    ".evaluate": taken(transformers.Trainer.evaluate),
    ".from_filename": taken(HTMLExporter.from_filename),
    "tokenizer()": taken(TOKENIZER.__call__),
    # Also: what its outputs hold. ``output_attentions`` is a property of the config; test_explanation looks at the weights it gives.
    "model()": taken(transformers.LlamaForCausalLM.forward) | taken(transformers.PreTrainedConfig) | {"output_attentions"},
    "base()": taken(transformers.LlamaForCausalLM.forward),
    "tuned()": taken(transformers.LlamaForCausalLM.forward),
    "pipe()": GENERATION,
}

CALLS = [call for path in FILES for call in calls(path)]
OF_LIBRARIES = [c for c in CALLS if c.target in METHODS or "." in c.target.lstrip(".")]


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_imported_name_is_there(path: Path) -> None:
    """Outage: any lesson stops with an ``ImportError`` in the middle, because a class moved to another module or was removed."""
    missing = []
    for dotted in imported(path).values():
        try:
            resolve(dotted)
        except (ImportError, AttributeError):
            missing.append(dotted)
    # google.colab is there on Colab alone, and asked for only where sys.modules holds it
    assert [m for m in missing if not m.startswith("google.colab")] == []


def unknown_keywords(path: Path) -> list[str]:
    """Keywords in ``path`` that the installed library does not take, each with its call."""
    wrong = []
    for call in calls(path):
        if call.target in METHODS:
            known = METHODS[call.target]
        elif "." in call.target.lstrip("."):
            known = taken(resolve(call.target)) | PASSED_ON.get(call.target, set())
        else:
            continue
        wrong += [f"{k} in {call.line}" for k in call.keywords if k not in known]
    return wrong


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_keyword_is_one_that_the_installed_library_takes(path: Path) -> None:
    """Outage: lesson 04 stops with ``TypeError: unexpected keyword`` at its model, or any lesson goes on with a keyword ignored."""
    assert unknown_keywords(path) == []


def test_the_calls_that_matter_are_among_those_looked_up() -> None:
    """Outage: the look-up itself goes blind (a renamed import), and any lesson may stop though the test above passes."""
    keywords: dict[str, set[str]] = {}
    for call in OF_LIBRARIES:
        keywords.setdefault(call.target, set()).update(call.keywords)
    expected = {
        "trl.SFTConfig": {"max_length", "warmup_steps", "eval_strategy", "activation_checkpointing", "packing_strategy", "bf16", "fp16"},
        "trl.SFTTrainer": {"model", "args", "train_dataset", "eval_dataset", "processing_class", "peft_config"},
        "peft.LoraConfig": {"r", "lora_alpha", "lora_dropout", "target_modules", "task_type"},
        "transformers.BitsAndBytesConfig": {"load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"},
        "transformers.AutoModelForCausalLM.from_pretrained": {
            "dtype",
            "quantization_config",
            "attn_implementation",
            "device_map",
            "revision",
        },
        "transformers.AutoTokenizer.from_pretrained": {"revision"},
        "papermill.execute_notebook": {"parameters", "cwd", "progress_bar", "log_output"},
        "transformers.AutoModel.from_pretrained": {"revision", "dtype"},
        "nbconvert.HTMLExporter": {"template_name"},
        "datasets.load_dataset": {"revision", "split"},
        "rouge_score.rouge_scorer.RougeScorer": {"use_stemmer"},
        ".generate": {"max_new_tokens", "do_sample", "eos_token_id", "pad_token_id", "streamer"},
        ".apply_chat_template": {"add_generation_prompt", "return_dict", "return_tensors", "tokenize"},
        ".train": {"resume_from_checkpoint"},
        "tokenizer()": {"return_tensors", "add_special_tokens"},
    }
    assert {
        target: names - keywords.get(target, set()) for target, names in expected.items() if not names <= keywords.get(target, set())
    } == {}


def test_the_look_up_finds_a_wrong_keyword(tmp_path: Path) -> None:
    """Outage: a look-up that finds nothing wrong in anything, and so any lesson may stop with a ``TypeError``."""
    file = tmp_path / "lesson.py"
    file.write_text(
        "from trl import SFTConfig\nimport transformers as t\nsizes = {'max_seq_length': 8}\n"
        "SFTConfig(output_dir='x', **sizes)\nt.BitsAndBytesConfig(load_in_3bit=True)\n"
        "t.AutoModelForCausalLM.from_pretrained('x', quantisation_config=None)\nmodel.generate(max_tokens=3)\n"
    )
    found = list(calls(file))
    assert [c.target for c in found] == [
        "trl.SFTConfig", "transformers.BitsAndBytesConfig", "transformers.AutoModelForCausalLM.from_pretrained", ".generate",
    ]  # fmt: skip
    assert [line.split(" in ")[0] for line in unknown_keywords(file)] == [
        "max_seq_length", "load_in_3bit", "quantisation_config", "max_tokens",
    ]  # fmt: skip


# ---- names that changed: what the lessons say about them stays true -------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_seq_length", "max_length"),
        ("warmup_ratio", "warmup_steps"),
        ("group_by_length", "train_sampling_strategy"),
        ("evaluation_strategy", "eval_strategy"),
        ("logging_dir", None),
        ("save_safetensors", None),
        ("overwrite_output_dir", None),
    ],
)
def test_an_old_setting_of_the_trainer_is_gone(old: str, new: str | None, tmp_path: Path) -> None:
    """Outage: lesson 04 says of last year's ``SFTConfig`` what is no longer so, or names a new setting that stops with a ``TypeError``."""
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{old}'"):
        trl.SFTConfig(output_dir=str(tmp_path), **{old: 1})
    assert new is None or new in SFT_FIELDS


def test_warmup_steps_below_one_are_a_share_of_the_run(tmp_path: Path) -> None:
    """Outage: lesson 04 trains without a warm-up: ``warmup_steps=0.03`` read as none, as it was when it had to be a whole number."""
    config = trl.SFTConfig(output_dir=str(tmp_path), warmup_steps=0.03, use_cpu=True, bf16=False)
    assert config.get_warmup_steps(200) == 6


def test_the_trainer_takes_a_processing_class_and_no_tokenizer() -> None:
    """Outage: lesson 04 stops with a ``TypeError`` where it builds the trainer: ``processing_class`` has been renamed once more."""
    names = inspect.signature(trl.SFTTrainer.__init__).parameters
    assert "processing_class" in names
    assert "tokenizer" not in names
    assert not any(p.kind is p.VAR_KEYWORD for p in names.values())


def test_left_alone_the_trainers_config_turns_on_bf16_and_checkpointing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outage: lesson 04 crawls on a T4 in emulated bf16, or checkpoints on a CPU for nothing, because a setting was left out."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    config = trl.SFTConfig(output_dir=str(tmp_path))
    assert config.bf16
    assert config.activation_checkpointing
    said = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, fp16=True, activation_checkpointing=False)
    assert not said.bf16
    assert not said.activation_checkpointing
    assert not said.gradient_checkpointing, "TRL reads the old name"


def test_the_old_name_of_activation_checkpointing_is_deprecated(tmp_path: Path) -> None:
    """Outage: lesson 04 stops with a ``TypeError`` when ``gradient_checkpointing`` disappears with transformers 6; it uses the new name."""
    help_text = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(transformers.TrainingArguments)}
    assert "Deprecated alias of `activation_checkpointing`" in help_text["gradient_checkpointing"]
    assert [c.line for c in CALLS if "gradient_checkpointing" in c.keywords] == []


def test_liger_is_deprecated_for_the_hubs_kernels() -> None:
    """Outage: lesson 04 recommends ``use_liger_kernel``, which disappears with TRL 2, and stops whoever follows it."""
    help_text = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(trl.SFTConfig)}
    assert re.search(r"Deprecated.*use_kernels", help_text["use_liger_kernel"])
    assert "use_kernels" in MODEL_LOADING


def test_a_model_is_no_longer_quantised_by_a_bare_keyword() -> None:
    """Outage: lessons 02 to 09 stop where they load the base: ``quantization_config`` has gone the way of ``load_in_4bit=True``."""
    with pytest.raises(TypeError, match="load_in_4bit"):
        transformers.AutoModelForCausalLM.from_pretrained(TINY_MODEL, load_in_4bit=True)
    assert "quantization_config" in MODEL_LOADING


def test_dtype_is_what_torch_dtype_was() -> None:
    """Outage: lesson 02 takes twice the memory because ``dtype`` is ignored, or stops when ``torch_dtype`` goes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float16)
    assert model.dtype == torch.float16
    assert [c.line for c in CALLS if "torch_dtype" in c.keywords] == []


def test_a_chat_template_gives_a_batch_encoding() -> None:
    """Outage: lesson 05 feeds the names of the fields to the model, because it takes a template's result for a list of ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_MODEL)
    encoded = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert isinstance(encoded, transformers.BatchEncoding)
    assert {"input_ids", "attention_mask"} <= set(encoded)


def test_generation_refuses_a_setting_that_it_does_not_know() -> None:
    """Outage: lesson 05 samples other answers than it says, because a removed generation setting is ignored without a word."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    ids = tokenizer("Asthma", return_tensors="pt")
    with pytest.raises(ValueError, match="max_tokens"):
        model.generate(**ids, max_tokens=3)


def test_the_quantisation_config_means_what_it_is_asked() -> None:
    """Outage: lesson 02 quantises to fp4 in float32, because ``BitsAndBytesConfig`` swallows a renamed keyword in ``**kwargs``."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    found = config.to_dict()
    assert found["load_in_4bit"] is True
    assert found["bnb_4bit_quant_type"] == "nf4"
    assert found["bnb_4bit_use_double_quant"] is True
    assert found["bnb_4bit_compute_dtype"] == "bfloat16"


def test_lora_takes_a_list_of_layers_and_no_unknown_word() -> None:
    """Outage: lesson 03 stops at ``LoraConfig``, or has its adapters on other layers than it says, because a field was renamed."""
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    assert config.target_modules == {"q_proj", "down_proj"}
    with pytest.raises(TypeError, match="rank"):
        peft.LoraConfig(rank=4)


def test_papermill_takes_our_keywords_itself_and_passes_but_the_configuration_to_the_engine() -> None:
    """Outage: any lesson under ``medquad run`` runs in another folder: papermill's engine ignores a keyword it does not know."""
    names = {n for n, p in inspect.signature(papermill.execute_notebook).parameters.items() if p.kind is not p.VAR_KEYWORD}
    used = {k for c in CALLS if c.target == "papermill.execute_notebook" for k in c.keywords}
    assert used
    assert used - {"config"} <= names


def test_importing_the_packages_names_warns_of_no_deprecation() -> None:
    """Outage: any lesson stops with an ``ImportError`` at the next release: a name was announced to go, and nobody read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        for path in FILES:
            for dotted in imported(path).values():
                if not dotted.startswith("google.colab"):
                    resolve(dotted)
