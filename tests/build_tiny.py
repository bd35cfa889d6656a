"""Remake the embedded base model: ``python tests/build_tiny.py``.

Everything is seeded: a byte-level BPE tokenizer trained on the statements; a small Llama with the
parts of Llama-3; pretraining on short articles, new ones at every step; a folder in the layout of
the Hub with a manifest of hashes.

The articles matter more than the steps. A base that saw single statements recalls each of them word
for word, but after fine-tuning it answers about the wrong condition, because nothing taught it to
carry a name along. An article returns to the name in its title in every sentence.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from build_sample import QUESTIONS, statements
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medquad_utils.assets import sample
from medquad_utils.chat import SYSTEM_PROMPT
from medquad_utils.files import write_json
from medquad_utils.profiles import TINY_MODEL as FOLDER

MANIFEST = "manifest.json"
# Writes the same bytes as Llama-3's own template. A new tokenizer gets the one that is there.
CHAT_TEMPLATE = (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
HEADER, END_HEADER, PAD = "<|start_header_id|>", "<|end_header_id|>", "<|finetune_right_pad_id|>"

# Llama-3's split of a text before BPE: contractions, words with the space before them, up to three
# digits, punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(vocab_size: int = 3072) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the statements, with Llama-3's special tokens and template."""
    corpus = [t for c in sample.conditions() for q in c.facts for t in statements(c, q)]
    for c in sample.conditions():
        corpus += [c.name, c.mention, " " + c.mention, " " + c.name] * 3
    # Questions and system prompt, without a name, so that a prompt does not fall into letters.
    corpus += [question.format(name="") for question in QUESTIONS.values()] * 50
    corpus += [SYSTEM_PROMPT, "system\n\n", "user\n\n", "assistant\n\n"] * 50
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, HEADER, END_HEADER, EOT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        additional_special_tokens=[HEADER, END_HEADER, EOT], chat_template=CHAT_TEMPLATE,
        model_max_length=1024, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, hidden: int = 256, layers: int = 4
) -> LlamaForCausalLM:
    """Create a Llama in fp32: grouped-query attention, tied embeddings, seeded weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64, max_position_embeddings=1024, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(
    tokenizer: PreTrainedTokenizerFast, rows: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of ``rows`` articles without end, right-padded; pads carry label -100."""
    rng, everything = random.Random(seed), sample.conditions()
    pool: list[sample.Condition] = []
    while True:
        texts, aspects = [], rng.randint(1, 9)  # one number a batch: its articles are alike in size
        for _ in range(rows):
            pool = pool or rng.sample(everything, len(everything))
            beside = rng.choice(everything) if rng.random() < 0.3 else None
            texts.append(sample.article(pool.pop(), aspects, rng, beside) + EOS)
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = ids.masked_fill(mask == 0, -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int = 0,
    rows: int = 16, peak: float = 3e-3,
) -> float:  # fmt: skip
    """Train ``model`` in place and return the mean loss of the last 50 steps."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    source, started = batches(tokenizer, rows, seed), time.time()
    recent: list[float] = []
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 200)  # warm-up, then a cosine to a tenth
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = peak * warm * cosine
        loss = model(**next(source)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-49:], loss.item()]
        if step % 50 == 49 or step == steps - 1:
            mean, minutes = sum(recent) / len(recent), (time.time() - started) / 60
            print(f"step {step + 1:>6}/{steps}  loss {mean:.4f}  {minutes:.1f} min", flush=True)
    return float(sum(recent) / len(recent))


def recall(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: int = 64) -> float:
    """Measure the share of statements that the base completes word for word, 0 to 1."""
    pairs = []
    for condition in sample.conditions():
        for qtype, facts in condition.facts.items():
            phrase = sample.phrase(qtype, facts)
            opening, rest = statements(condition, qtype)[0].split(phrase)
            pairs.append((opening.rstrip(), phrase + rest))
    pairs.sort(key=lambda pair: len(tokenizer(pair[0])["input_ids"]))
    right = 0
    for start in range(0, len(pairs), rows):
        openings, expected = zip(*pairs[start : start + rows], strict=True)
        batch = tokenizer(list(openings), return_tensors="pt", padding=True, padding_side="left")
        longest = max(len(tokenizer(text)["input_ids"]) for text in expected) + 2
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=longest, do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        right += sum(t.strip().startswith(e) for t, e in zip(texts, expected, strict=True))
    return right / len(pairs)


def write_manifest(folder: Path, **facts: object) -> None:
    """Write the hashes of the model's files and of its sources, with facts about the run."""

    def sha256(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    configs = ("config", "tokenizer", "tokenizer_config", "generation_config")
    names = ("model.safetensors", *(f"{name}.json" for name in configs))
    sources = {
        "conditions.toml": sha256(sample.CONDITIONS.read_bytes()),
        "statements": sha256(json.dumps(sample.STATEMENTS, sort_keys=True).encode()),
    }
    hashes = {name: sha256((folder / name).read_bytes()) for name in names}
    write_json(folder / MANIFEST, {"files": hashes, "made_from": sources, **facts})


def build(folder: Path, steps: int, seed: int) -> None:
    """Remake tokenizer, weights and manifest in ``folder``."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"vocabulary {len(tokenizer)}, {parameters / 1e6:.2f} M parameters", flush=True)
    loss = pretrain(model, tokenizer, steps, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(EOT)],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # What is shipped is measured: the weights after they were rounded to bf16.
    shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    facts = {"steps": steps, "seed": seed, "parameters": parameters, "loss": round(loss, 4)}
    facts |= {"recall": round(recall(shipped, tokenizer), 4)}
    print(f"recall in statement form: {facts['recall']:.1%}", flush=True)
    write_manifest(folder, **facts, torch=torch.__version__.split("+")[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build(args.out, args.steps, args.seed)
