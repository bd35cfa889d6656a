"""Remake the embedded base model from ``conditions.toml``: ``python -m medquad_utils.assets.build``.

The recipe, in four steps, all seeded: a byte-level BPE tokenizer trained on the statements; a small ``LlamaForCausalLM``
with Llama-3's parts (grouped-query attention, RoPE theta 500,000, SwiGLU, RMSNorm, tied embeddings); pretraining on
short articles that are drawn afresh at every step; a folder in the Hub's layout with a manifest of hashes.

The articles matter more than the steps. A base that saw single statements recalls each of them word for word, and yet
answers about the wrong condition after fine-tuning: nothing taught it to carry a name along. An article has a title
and comes back to the name in every sentence; that teaches it.
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
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medquad_utils.assets.sample import (
    CONDITIONS,
    QUESTIONS,
    STATEMENTS,
    article,
    conditions,
    phrase,
    statements,
)
from medquad_utils.chat import CHAT_TEMPLATE, SYSTEM_PROMPT

FOLDER = Path(__file__).with_name("tiny")
MANIFEST = "manifest.json"

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
HEADER, END_HEADER, PAD = "<|start_header_id|>", "<|end_header_id|>", "<|finetune_right_pad_id|>"
SPECIAL = [BOS, EOS, HEADER, END_HEADER, EOT, PAD]

# How Llama-3 cuts text before BPE, in one expression: contractions, words with their leading space, digits in threes,
# punctuation, line ends, spaces.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build_tokenizer(vocab_size: int = 3072) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Llama-3's special tokens and chat template, trained on the statements.

    The words of the question templates and of the system prompt are in its corpus too (with no condition's name beside
    them), so that a prompt does not fall apart into letters.
    """
    corpus = [text for c in conditions() for qtype in c.facts for text in statements(c, qtype)]
    corpus += [
        name for c in conditions() for name in (c.name, c.mention, " " + c.mention, " " + c.name)
    ] * 3
    corpus += [q.format(name="") for q in QUESTIONS.values()] * 50 + [
        SYSTEM_PROMPT,
        "system\n\n",
        "user\n\n",
        "assistant\n\n",
    ] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[HEADER, END_HEADER, EOT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, hidden: int = 256, layers: int = 4
) -> LlamaForCausalLM:
    """A fresh Llama in fp32, weights drawn with ``seed``."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    tokenizer: PreTrainedTokenizerFast, rows: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of ``rows`` articles of alike length, right-padded; pads carry label -100."""
    rng = random.Random(seed)
    pool: list[int] = []
    while True:
        texts, aspects = [], rng.randint(1, 9)
        for _ in range(rows):
            pool = pool or rng.sample(range(len(conditions())), len(conditions()))
            beside = rng.choice(conditions()) if rng.random() < 0.3 else None
            texts.append(article(conditions()[pool.pop()], aspects, rng, beside) + EOS)
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
        }


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    seed: int = 0,
    rows: int = 16,
    peak: float = 3e-3,
) -> float:
    """Train ``model`` in place with AdamW (warm-up, then cosine to a tenth); returns the mean loss of the last 50 steps."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    source, started = batches(tokenizer, rows, seed), time.time()
    recent: list[float] = []
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 200)
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
            spent = time.time() - started
            left = spent / (step + 1) * (steps - step - 1)
            mean = sum(recent) / len(recent)
            print(
                f"step {step + 1:>6}/{steps}  loss {mean:.4f}  {spent / 60:.1f} min, {left / 60:.1f} left",
                flush=True,
            )
    return float(sum(recent) / len(recent))


def recall(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: int = 64) -> float:
    """Share of all (condition, question type) pairs whose facts the base adds, word for word, to the opening of a statement."""
    pairs = []
    for condition in conditions():
        for qtype, facts in condition.facts.items():
            opening, rest = statements(condition, qtype)[0].split(phrase(qtype, facts))
            pairs.append((opening.rstrip(), phrase(qtype, facts) + rest))
    pairs.sort(key=lambda pair: len(tokenizer(pair[0])["input_ids"]))
    right = 0
    for start in range(0, len(pairs), rows):
        openings, wanted = zip(*pairs[start : start + rows], strict=True)
        batch = tokenizer(list(openings), return_tensors="pt", padding=True, padding_side="left")
        longest = max(len(tokenizer(w)["input_ids"]) for w in wanted) + 2
        with torch.inference_mode():
            out = model.generate(
                **batch,
                max_new_tokens=longest,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        said = tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(text.strip().startswith(w) for text, w in zip(said, wanted, strict=True))
    return right / len(pairs)


def sha256(path: Path) -> str:
    """Hash of a file; a text file is read with line ends of one kind, so that a checkout on Windows hashes alike."""
    data = path.read_bytes()
    return hashlib.sha256(
        data if path.suffix == ".safetensors" else data.replace(b"\r\n", b"\n")
    ).hexdigest()


def write_manifest(folder: Path, **facts: object) -> None:
    """Write the hashes of the model's files and of what they were made from, with the facts of the run."""
    names = (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    )
    files = {name: sha256(folder / name) for name in names}
    made_from = {"conditions.toml": sha256(CONDITIONS), "statements": _statements_hash()}
    (folder / MANIFEST).write_text(
        json.dumps({"files": files, "made_from": made_from, **facts}, indent=2) + "\n",
        encoding="utf-8",
    )


def _statements_hash() -> str:
    return hashlib.sha256(json.dumps(STATEMENTS, sort_keys=True).encode()).hexdigest()


def build(folder: Path, steps: int, seed: int) -> None:
    """Remake tokenizer, weights and manifest in ``folder``."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(conditions())} conditions, vocabulary {len(tokenizer)}, {parameters / 1e6:.2f} M parameters",
        flush=True,
    )
    loss = pretrain(model, tokenizer, steps, seed)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(EOT)]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    remembered = round(recall(shipped, tokenizer), 4)
    print(f"recall in statement form: {remembered:.1%}", flush=True)
    version = torch.__version__.split("+")[0]
    write_manifest(
        folder,
        steps=steps,
        seed=seed,
        parameters=parameters,
        loss=round(loss, 4),
        recall=remembered,
        torch=version,
    )


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder to write (default: the package's own)"
    )
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build(args.out, args.steps, args.seed)


if __name__ == "__main__":
    main()
