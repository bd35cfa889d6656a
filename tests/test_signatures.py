"""Every name and keyword that the course takes from a library, looked up in the library.

Libraries rename. A lesson then ends in a ``TypeError``, or a keyword is silently ignored.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import transformers
import trl
from conftest import REPO
from nbconvert import HTMLExporter
from papermill.clientwrap import PapermillNotebookClient
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from medquad_utils.profiles import TINY_MODEL

NOTEBOOKS = (REPO / "notebooks").rglob("0*.ipynb")
FILES = sorted([*(REPO / "medquad_utils").rglob("*.py"), *NOTEBOOKS])
Call = tuple[str, list[str], str]  # a dotted name, or ".method"; the keywords; the line


@cache
def tree(path: Path) -> ast.Module:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [c for c in json.loads(source)["cells"] if c["cell_type"] == "code"]
        source = "\n".join("".join(c["source"]) for c in cells)
        source = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)
    return ast.parse(source)


@cache
def imported(path: Path) -> dict[str, str]:
    """Local name -> dotted name of every import from outside the standard library."""
    names = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for a in node.names:
                top = a.name.split(".")[0]
                names[a.asname or top] = a.name if a.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return {k: v for k, v in names.items() if v.split(".")[0] not in sys.stdlib_module_names}


def dict_keys(node: ast.expr) -> list[str]:
    """Keys that are written out in a dict, or in dicts joined by ``|``."""
    if isinstance(node, ast.BinOp):
        return dict_keys(node.left) + dict_keys(node.right)
    keys = node.keys if isinstance(node, ast.Dict) else []
    return [k.value for k in keys if isinstance(k, ast.Constant)]


def calls(path: Path) -> Iterator[Call]:
    """Every call with keywords, those of a ``**name`` whose dict stands above it included."""
    names, dicts = imported(path), {}
    nodes = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Assign | ast.Call)]
    for node in sorted(nodes, key=lambda n: (n.lineno, isinstance(n, ast.Assign))):
        if isinstance(node, ast.Assign):
            dicts |= {t.id: dict_keys(node.value) for t in node.targets if isinstance(t, ast.Name)}
            continue
        keywords = [k.arg for k in node.keywords if k.arg]
        for splat in (k.value for k in node.keywords if k.arg is None):
            keywords += dicts.get(getattr(splat, "id", ""), dict_keys(splat))
        parts, root = [], node.func
        while isinstance(root, ast.Attribute):
            parts, root = [root.attr, *parts], root.value
        local = root.id if isinstance(root, ast.Name) else ""
        method = f".{parts[-1]}" if parts else f"{local}()"
        target = ".".join([names[local], *parts]) if local in names else method
        if keywords:
            yield target, keywords, f"{path.name}: {ast.unparse(node)[:120]}"


def taken(function: Callable[..., Any]) -> set[str]:
    """Names in a function's signature, and those that it takes out of its ``**kwargs``.

    A built-in function without a signature is read in its own documentation.
    """
    owners = [function]
    if inspect.isclass(function):
        owners += [c.__init__ for c in function.__mro__ if "__init__" in vars(c)]
    names: set[str] = set()
    for owner in owners:
        try:
            parameters = inspect.signature(owner).parameters.values()
        except (TypeError, ValueError):
            if owner is function:
                names |= set(re.findall(r"\b(\w+)(?:: [\w.]+)? ?=", function.__doc__ or ""))
            continue
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
        try:
            source = inspect.getsource(owner)
        except (OSError, TypeError):
            continue
        names |= set(re.findall(r'kwargs\.(?:pop|get|setdefault)\(\s*"(\w+)"', source))
    return names


FORWARD = taken(transformers.LlamaForCausalLM.forward)
GENERATION = set(vars(transformers.GenerationConfig())) | {"input_ids", "attention_mask"}
GENERATION |= taken(transformers.GenerationMixin.generate)
LOADING = taken(transformers.PreTrainedModel.from_pretrained)
TOKENIZER = transformers.PreTrainedTokenizerBase
DECODE = taken(TOKENIZER.decode) | taken(transformers.PreTrainedTokenizerFast._decode)
TOKENIZING = taken(TOKENIZER.from_pretrained)
SPACE = {"emoji", "colorFrom", "colorTo", "suggested_hardware", "pinned"}  # a Space's card
SFT_FIELDS = {f.name for f in dataclasses.fields(trl.SFTConfig)}

# What passes its keywords on: the names that the last receiver takes.
PASSED_ON: dict[str, set[str]] = {
    "transformers.AutoModelForCausalLM.from_pretrained": LOADING,
    "transformers.AutoModel.from_pretrained": LOADING,
    "transformers.AutoTokenizer.from_pretrained": TOKENIZING,
    "transformers.TextIteratorStreamer": DECODE,
    "nbconvert.HTMLExporter": set(HTMLExporter.class_trait_names()),
    "papermill.execute_notebook": {"config"} & set(PapermillNotebookClient.class_trait_names()),
    "medquad_utils.training.build_trainer": SFT_FIELDS,
    "medquad_utils.specialise.ensure": SFT_FIELDS,
    "medquad_utils.training.save_adapter": {"recipe", "steps", "losses"},  # go into the record
    "medquad_utils.generation.generate": GENERATION,
    "medquad_utils.generation.ask": GENERATION | {"batch_size", "progress"},
    "jupyter_client.kernelspec.KernelSpec": {"resource_dir"},
    "medquad_utils.files.read_json": {"profile", "model_id", "model_path", "seed", "eos_token_id"},
    "medquad_utils.checks.common.letters": set("abcdefgh"),  # a hint for each letter
    "huggingface_hub.SpaceCardData": SPACE,
    "starlette.middleware.Middleware": taken(BaseHTTPMiddleware)
    | taken(RequestBodyLimitMiddleware),
}
# Methods by their name, and calls of objects by the name that the course gives them.
METHODS: dict[str, set[str]] = {
    ".apply_chat_template": taken(TOKENIZER.apply_chat_template), ".generate": GENERATION,
    ".train": taken(transformers.Trainer.train), ".evaluate": taken(transformers.Trainer.evaluate),
    ".from_filename": taken(HTMLExporter.from_filename), ".decode": DECODE, "pipe()": GENERATION,
    "tokenizer()": taken(TOKENIZER.__call__), "base()": FORWARD, "tuned()": FORWARD,
    "model()": FORWARD | taken(transformers.PreTrainedConfig),
}  # fmt: skip


def unknown_keywords(path: Path) -> list[str]:
    """Keywords in ``path`` that the installed library does not take, each with its call."""
    wrong = []
    for target, keywords, line in calls(path):
        if target in METHODS or "." in target.lstrip("."):
            known = METHODS[target] if target in METHODS else taken(resolve_name(target))
            known = known | PASSED_ON.get(target, set())
            wrong += [f"{k} in {line}" for k in keywords if k not in known]
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_imported_name_and_keyword_exists(path: Path) -> None:
    only_there = ("google.colab", "kaggle_secrets")
    for dotted in imported(path).values():
        if not dotted.startswith(only_there):
            resolve_name(dotted)
    assert unknown_keywords(path) == []


def test_the_look_up_sees_the_calls_that_matter() -> None:
    found = {(target, k) for path in FILES for target, keys, _ in calls(path) for k in keys}
    for target, names in {
        "trl.SFTConfig": "max_length warmup_steps eval_strategy activation_checkpointing bf16 fp16",
        "trl.SFTTrainer": "model args train_dataset eval_dataset processing_class peft_config",
        "peft.LoraConfig": "r lora_alpha lora_dropout target_modules task_type",
        "transformers.AutoModelForCausalLM.from_pretrained": "dtype quantization_config revision",
        ".generate": "max_new_tokens do_sample eos_token_id pad_token_id streamer",
        ".apply_chat_template": "add_generation_prompt return_dict return_tensors tokenize",
    }.items():
        assert {(target, name) for name in names.split()} <= found, target


def test_the_look_up_finds_a_wrong_keyword(tmp_path: Path) -> None:
    file = tmp_path / "lesson.py"
    file.write_text(
        "from trl import SFTConfig\nimport transformers as t\nsizes = {'max_seq_length': 8}\n"
        "SFTConfig(output_dir='x', **sizes)\nt.BitsAndBytesConfig(load_in_3bit=True)\n"
        "t.AutoModel.from_pretrained('x', quantisation_config=None)\nmodel.generate(max_tokens=3)\n"
    )
    wrong = [line.split(" in ")[0] for line in unknown_keywords(file)]
    assert wrong == ["max_seq_length", "load_in_3bit", "quantisation_config", "max_tokens"]


@pytest.mark.parametrize(("old", "new"), [
    ("max_seq_length", "max_length"), ("group_by_length", "train_sampling_strategy"),
    ("evaluation_strategy", "eval_strategy"), ("logging_dir", ""), ("overwrite_output_dir", ""),
])  # fmt: skip
def test_an_old_setting_of_the_trainer_is_gone(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{old}'"):
        trl.SFTConfig(output_dir=str(tmp_path), **{old: 1})
    assert not new or new in SFT_FIELDS


def test_models_and_trainers_are_made_with_the_new_names() -> None:
    names = taken(trl.SFTTrainer)
    assert "processing_class" in names and "tokenizer" not in names
    load = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(TypeError, match="load_in_4bit"):
        load(TINY_MODEL, load_in_4bit=True)
    assert load(TINY_MODEL, dtype=torch.float16).dtype == torch.float16


def test_left_alone_the_trainer_turns_on_bf16(tmp_path: Path, monkeypatch: Any) -> None:
    """Lesson 04 says why its precision is written out."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    assert trl.SFTConfig(output_dir=str(tmp_path)).bf16
    given = {"bf16": False, "warmup_steps": 0.03, "use_cpu": True}
    config = trl.SFTConfig(output_dir=str(tmp_path), activation_checkpointing=False, **given)
    assert not config.bf16 and not config.gradient_checkpointing, "TRL reads the old name"
    assert config.get_warmup_steps(200) == 6, "below one it is a share of the run"


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl.kernels import chunked_logprob

target = GPUTarget("cuda", int(sys.argv[1]), 32)
for kernel in (chunked_logprob._forward_kernel, chunked_logprob._backward_kernel):
    flags = {n: 1024 if n == "BLOCK_SIZE" else True for n in kernel.arg_names if n.isupper()}
    plain = {"mm_stride": "i32", "vocab_start": "i32", "n_cols": "i32"}
    plain |= dict.fromkeys(("logit_scale", "softcap", "inv_t"), "fp32")
    for logits in ("fp16", "bf16", "fp32"):
        pointers = {"mm_ptr": f"*{logits}", "targets_ptr": "*i64"}
        kinds = {name: (plain | pointers).get(name, "*fp32") for name in kernel.arg_names}
        kinds |= dict.fromkeys(flags, "constexpr")
        made = triton.compile(ASTSource(kernel, kinds, constexprs=flags), target=target)
        print("compiled", kernel.fn.__name__, logits, len(made.asm["cubin"]) > 0)
"""


@pytest.fixture(scope="module")
def with_triton(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment that finds triton, which a CPU build of torch leaves out."""
    if importlib.util.find_spec("triton"):
        return dict(os.environ)
    folder = tmp_path_factory.mktemp("triton")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--target", str(folder), "triton==3.9.0"]  # 1 GB unpacked: not in the test extra
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip(f"triton cannot be installed here: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-1000:]
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.mark.full  # a minute of compiling
@pytest.mark.parametrize("capability", [75, 80, 89, 90], ids=["T4", "A100", "L4", "H100"])
def test_trls_loss_compiles_for_a_card(
    capability: int, with_triton: dict[str, str], tmp_path: Path
) -> None:
    """TRL takes its Triton kernels on every GPU; an update that drops the T4 is seen here."""
    env = with_triton | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("True\n") == 6, done.stdout
