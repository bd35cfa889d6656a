"""A Llama of an exact shape with seeded random weights: what benchmarks load without the Hub."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from medquad_utils.profiles import PROFILES, TINY_MODEL, Shape

SHAPES = {name: profile.shape for name, profile in PROFILES.items()}
SHAPES["20m"] = Shape(384, 10, 1024, 6, 3, 8192, tied=True)


def write(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Write a model folder in the Hub's layout, weights in bf16; returns ``folder``.

    The weights are drawn on the GPU, if there is one: 8 B take minutes on a CPU. The tokenizer is
    the tiny model's. Ids beyond its vocabulary exist and are never used.
    """
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    ends = GenerationConfig.from_pretrained(TINY_MODEL)
    config = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, vocab_size=shape.vocab,
        intermediate_size=shape.intermediate, tie_word_embeddings=shape.tied,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    cuda = torch.cuda.is_available()
    with torch.random.fork_rng(), torch.device("cuda" if cuda else "cpu"):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
