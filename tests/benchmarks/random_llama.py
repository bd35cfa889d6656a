"""A Llama of exact shape with seeded random weights, in the Hub's layout: what a benchmark loads where no Hub can be reached.

Run it from the root of the checkout: ``python tests/benchmarks/random_llama.py --profile llama-1b --out DIR``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # the checkout, whatever is installed

from medquad_utils.data import whole_folder
from medquad_utils.profiles import PROFILES, TINY_MODEL, CourseError, Shape

SHAPES = {name: p.shape for name, p in PROFILES.items()} | {"20m": Shape(384, 10, 1024, 6, 3, 8192, tied=True)}
SHARD = 4e9  # bytes of weights in one file, and so about what making it holds in memory
INIT = 0.02  # standard deviation of the weights, as Llama's own at the start of its training
# Llama 3.2 stretches its rotary positions; 3.0 does not. Speed and memory are the same, the folder is as the Hub's.
ROPE_1B = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip


def weights(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the layers."""
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        for name, (inputs, outputs) in shape.linears().items():
            block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            yield f"model.layers.{layer}.{block}.{name}.weight", (outputs, inputs)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, shape.hidden)


def shards(shape: Shape, size: float = SHARD) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in files of at most ``size`` bytes (2 a weight; a larger tensor has a file of its own)."""
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, sizes in weights(shape):
        if files[-1] and held + 2 * math.prod(sizes) > size:
            files.append([])
            held = 0
        files[-1].append((name, sizes))
        held += 2 * math.prod(sizes)
    return files


def write(shape: Shape, folder: Path, seed: int = 0, size: float = SHARD) -> Path:
    """Write config, bf16 safetensors, generation config and the tiny model's tokenizer to ``folder``, file by file; returns it.

    The tokenizer's ids are a part of the vocabulary: the others exist and are never asked for.

    Raises:
        CourseError: the folder exists already, or its shape cannot hold the tokenizer.
    """
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    if folder.exists() or len(tokenizer) > shape.vocab:
        raise CourseError(f"{folder.name}: expected a folder that does not exist yet, and a vocabulary of at least {len(tokenizer)}.")
    with whole_folder(folder) as fresh:
        fresh.mkdir()
        ends = json.loads((TINY_MODEL / "generation_config.json").read_text())
        config = LlamaConfig(
            hidden_size=shape.hidden, num_hidden_layers=shape.layers, intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim or shape.hidden // shape.heads,
            vocab_size=shape.vocab, tie_word_embeddings=shape.tied, max_position_embeddings=131072 if shape.head_dim else 8192,
            rms_norm_eps=1e-5, rope_parameters=ROPE_1B if shape.head_dim else {"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=tokenizer.bos_token_id, eos_token_id=ends["eos_token_id"], pad_token_id=tokenizer.pad_token_id,
            dtype="bfloat16", architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        config.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        shutil.copy(TINY_MODEL / "generation_config.json", fresh)
        files = shards(shape, size)
        index: dict[str, str] = {}
        generator = torch.Generator().manual_seed(seed)
        for number, tensors in enumerate(files, start=1):
            file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            made = {
                name: torch.ones(sizes, dtype=torch.bfloat16)
                if len(sizes) == 1
                else torch.empty(sizes, dtype=torch.bfloat16).normal_(0, INIT, generator=generator)
                for name, sizes in tensors
            }
            save_file(made, fresh / file, metadata={"format": "pt"})
            index |= dict.fromkeys(made, file)
            del made
        if len(files) > 1:
            total = 2 * sum(math.prod(sizes) for _, sizes in weights(shape))
            record = {"metadata": {"total_size": total}, "weight_map": index}
            (fresh / "model.safetensors.index.json").write_text(json.dumps(record, indent=1))
    return folder


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        write(SHAPES[options.profile], options.out, options.seed)
    except CourseError as error:
        print(f"random_llama: {error}", file=sys.stderr)
        return 1
    print(f"{SHAPES[options.profile].parameters:,} parameters in {options.out.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
