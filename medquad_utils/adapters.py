"""Identify a base and an adapter by their content, and check that the two belong together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medquad_utils import CourseError, machine
from medquad_utils.chat import end_ids
from medquad_utils.files import content_hash, read_json, user_path, value_hash, write_json
from medquad_utils.profiles import Plan, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# What identifies a local base; generation settings and pages for readers change no answer.
OF_BASE = ("config.json", "tokenizer.json", "chat_template.jinja", "*.safetensors", "*.bin")
# Fields of an adapter's config that may have any value: peft applies them beside the base. Every
# other field must have peft's default, or none.
FREE = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "inference_mode",
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
}  # fmt: skip
GAUSSIAN = ("init_lora_weights", "gaussian")  # leaves the base as it is, like peft's default


def check_tensors(model: Any, name: str, folder: Path) -> None:
    """Check that an adapter is finite and has the tensors of its file: peft would only warn."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    loaded = get_peft_model_state_dict(model, adapter_name=name)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        if differ := sorted(loaded.keys() ^ set(file.keys())):
            raise ValueError(f"its file and its config do not have the same tensors: {differ[0]}")
    if broken := [name for name, tensor in loaded.items() if not tensor.isfinite().all()]:
        raise ValueError(f"it holds numbers that are not finite: {min(broken)}")


def adapter_record(folder: Path) -> dict[str, Any]:
    """Read what an adapter's folder records: ``adapter_config.json``, then the course's plan."""
    files = [folder / "adapter_config.json", folder / "plan.json"]
    return {key: v for file in files if file.exists() for key, v in read_json(file).items()}


def resolve_trained(
    profile: str = "auto", *, model: str = "", out: str = "", adapter: Path | None = None
) -> Plan:
    """Resolve for an adapter: ``auto`` is the profile that it was trained with.

    Without ``adapter`` it is the profile's, and for ``auto`` the newest under ``out``. Its
    ``plan.json`` gives the seed and, without ``model``, the base. The path of a base in a folder is
    relative to the adapter's folder.
    """
    out = str(user_path(out or machine.default_out()))
    if profile == "auto":
        records = [adapter / "plan.json"] if adapter else Path(out).glob("*/adapter/plan.json")
        trained = sorted((r for r in records if r.is_file()), key=lambda r: r.stat().st_mtime)
        profile = read_json(trained[-1]).get("profile", profile) if trained else profile
    plan = resolve(profile, model=model, out=out)
    adapter = adapter or plan.folder / "adapter"
    if not (adapter / "plan.json").is_file():
        return plan
    kinds = {"profile": str, "seed": int, "model_id": str, "model_path": str}
    base = plan.as_dict() | read_json(adapter / "plan.json", **kinds)
    plan = dataclasses.replace(plan, seed=base["seed"])
    if model:
        return plan
    folder = adapter / base["model_path"] if base["model_path"] else None
    if folder and not (folder / "config.json").is_file():
        raise CourseError(
            f"the adapter in {adapter.name}/ was trained on the model in {base['model_path']}, "
            "which holds no config.json now. Say where the model is: --model DIR."
        )
    path = str(folder.resolve()) if folder else ""
    return dataclasses.replace(
        plan, model_id=base["model_id"], revision=base["revision"], model_path=path
    )


def check_same_base(adapters: Mapping[str, Path]) -> None:
    """Check that all adapters (name -> folder) were trained on the same base model."""
    adapter_of = {base: name for name, folder in adapters.items() if (base := _trained_on(folder))}
    if len(adapter_of) > 1:
        (first, one), (second, other), *_ = adapter_of.items()
        raise CourseError(
            f"adapters of different bases cannot share one base: {one!r} was trained on {first}, "
            f"{other!r} on {second}. Leave one out, or train {other!r} again on {first}."
        )


def check_adapter(plan: Plan, folder: Path) -> None:
    """Check that an adapter's folder is complete and was trained on the plan's base model.

    One that records neither base nor commit is believed.
    """
    from peft import LoraConfig

    if not all((folder / f"adapter_{n}").is_file() for n in ("config.json", "model.safetensors")):
        raise CourseError(
            f"no adapter in {folder.name}/: lesson 04 trains one "
            f"(medquad run --profile {plan.profile} --only 04)."
        )
    default = LoraConfig(task_type="CAUSAL_LM").to_dict()
    for field, value in read_json(folder / "adapter_config.json").items():
        known = field in FREE or value == default.get(field) or (field, value) == GAUSSIAN
        if value and not known:
            raise CourseError(
                f"the adapter in {folder.name}/ has {field} = {value!r} in adapter_config.json, "
                "which the course does not know: expected a LoRA of linear layers that leaves its "
                "base as it is. Train it without this option, or convert it to a plain LoRA."
            )
    trained_on, loaded = _trained_on(folder), f"{plan.model_id} ({base_id(plan)})"
    if trained_on and trained_on != loaded:
        raise CourseError(
            f"the adapter was trained on {trained_on}, but the plan loads {loaded}. "
            "Use its profile, name its base model, or run lesson 04 again."
        )


def _trained_on(folder: Path) -> str:
    """Return the id of an adapter's base and its weights, as ``base_id`` writes them, or ""."""
    record = adapter_record(folder)
    if "base" in record:
        return f"{record['model_id']} ({record['base']})"
    name, commit = record.get("base_model_name_or_path"), record.get("revision")
    return f"{name} ({name}@{commit})" if name and commit else ""  # of a published adapter


def base_id(plan: Plan) -> str:
    """Identify a base: Hub id and commit, or a hash of a folder's weights, config and tokenizer."""
    folder = Path(plan.model_source)
    if not folder.is_dir():
        return f"{plan.model_id}@{plan.hub_revision or 'main'}"
    patterns = [*OF_BASE]
    if not (folder / "chat_template.jinja").is_file():
        patterns.append("tokenizer_config.json")  # where older folders keep the template
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return _base_hash(folder, *((f, f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@functools.lru_cache  # the 16 GB of 8 B parameters are hashed once a process
def _base_hash(folder: Path, *states: tuple[Path, int, int]) -> str:
    return content_hash((file for file, *_ in states), folder)[:16]


def adapter_id(folder: Path) -> str:
    """Identify an adapter: a hash of its weights and of the settings that scale them."""
    config = read_json(folder / "adapter_config.json")
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    weights = content_hash([folder / "adapter_model.safetensors"], folder)
    return value_hash([weights, *map(config.get, names)])


def save_with(tokenizer: Tokenizer, folder: Path) -> None:
    """Complete a folder of weights: tokenizer, generation config, and JSON that others read right.

    The tokenizer pads on the left, for generation; answers are greedy and stop at every end token.
    transformers before 5, vLLM and Ollama know neither ``rope_parameters`` nor the tokenizer's
    class of transformers 5: what they look for stands there as well.
    """
    from transformers import GenerationConfig

    tokenizer.save_pretrained(folder)
    tokens: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id}
    tokens |= {"eos_token_id": end_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    GenerationConfig(do_sample=False, **tokens).save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    if extra := settings.pop("extra_special_tokens", None):
        settings["additional_special_tokens"] = extra
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(folder / "tokenizer_config.json", settings)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json") | {"pad_token_id": tokenizer.pad_token_id}
        rope = config.get("rope_parameters") or {}
        config |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        write_json(folder / "config.json", config)
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 600, which another account cannot serve
