"""Memory of training a Llama in 4 bits, part by part, by arithmetic on its sizes (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BLOCK = 64  # weights that share one scale
SUPER_BLOCK = 256  # scales that share one scale of scales
NF4_CODE_BITS = 4
# Tokens and vocabulary of one tile of logits: trl 1.16, kernels/chunked_logprob.py.
LOSS_ROWS, LOSS_COLUMNS = 4096, 32768
# training.py narrows the tiles on a CPU, where TRL makes several copies of each: they stay in its
# cache and need no new pages. SmolLM2-135M trains 1.35 times as fast.
CPU_LOSS_COLUMNS = 8192
BASE_GB = 0.8  # CUDA context and cuBLAS workspaces, or Python's libraries on a CPU; an assumption
# All seven linear layers: the QLoRA paper (section 4) finds that this matters more than the rank.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama that decide parameter counts and memory."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    head_dim: int = 0  # 0 = hidden / heads

    def __post_init__(self) -> None:
        # A config names the size where the profile leaves it out: one Llama must be one shape.
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden // self.heads)

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the sizes from a ``LlamaConfig`` (or any config with its field names)."""
        return cls(
            config.hidden_size, config.num_hidden_layers, config.intermediate_size,
            config.num_attention_heads, config.num_key_value_heads, config.vocab_size,
            config.tie_word_embeddings, getattr(config, "head_dim", 0) or 0,
        )  # fmt: skip

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return name -> (inputs, outputs) of the seven linear layers of one block."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        h, up = self.hidden, (self.hidden, self.intermediate)
        sizes = (h, queries), (h, keys), (h, keys), (queries, h), up, up, (self.intermediate, h)
        return dict(zip(ALL_LINEAR, sizes, strict=True))

    @property
    def block_parameters(self) -> int:
        """Count the weights of all blocks' linear layers, which are stored in 4 bits."""
        return self.layers * sum(i * o for i, o in self.linears().values())

    @property
    def embedding_parameters(self) -> int:
        """Count the weights of embedding and head (one if tied), which stay in 16 or 32 bits."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Count all weights, the norms included."""
        norms = self.hidden * (2 * self.layers + 1)
        return self.block_parameters + self.embedding_parameters + norms


@dataclass(frozen=True)
class Micro:
    """One micro-batch, a single row, and the numbers that it is computed in."""

    length: int  # tokens, padding included
    rank: int
    compute_bytes: int = 2
    adapter_bytes: int = 2
    checkpoint: bool = False  # recompute each block from its input
    dropout: bool = False  # on the adapters' inputs
    cuda: bool = True
    varlen: bool = False  # attention within each example, by torch's kernel; else SDPA with a mask
    adam_bytes: int = 4  # of each of Adam's two averages


def bits_per_parameter(double_quant: bool) -> float:
    """Return the stored bits of a 4-bit weight with its scales (QLoRA, arXiv 2305.14314)."""
    return NF4_CODE_BITS + (8 + 32 / SUPER_BLOCK if double_quant else 32) / BLOCK


def adapter_parameters(shape: Shape, rank: int, modules: tuple[str, ...] = ALL_LINEAR) -> int:
    """Count the trainable parameters: rank x (inputs + outputs) for each adapted layer."""
    linears = shape.linears()
    return shape.layers * sum(rank * sum(linears[name]) for name in linears if name in modules)


def block_bytes(shape: Shape, micro: Micro) -> float:
    """Return the bytes a token that autograd keeps of one block, without checkpointing.

    Read off ``saved_tensors_hooks`` for transformers 5.23 and peft 0.21; tests/test_estimate.py
    counts again. In the compute dtype: the inputs of the adapters of q, k, v (one, shared), of o,
    of gate, up (shared) and of down; gate, up and SiLU's output; q, k and v; the seven narrow
    outputs of ``lora_A``. A row's mask forbids native grouped attention, so that k and v are
    repeated for every head, and a row of the mask is kept too. In 32 bits: both norms' inputs, a
    log-sum-exp a head. Dropout gives each adapter its own copy and a mask: one byte a value on
    CUDA, a full value on a CPU.
    """
    c, h, i, q = micro.compute_bytes, shape.hidden, shape.intermediate, shape.linears()["o_proj"][0]
    kv = shape.linears()["k_proj"][1] if micro.varlen else q
    kept = 4 * i + 2 * h + 2 * (q + kv) + 7 * micro.rank + (0 if micro.varlen else micro.length)
    inputs = 5 * h + q + i
    # Dropout frees the shared inputs, but attention still keeps what it gave to o.
    dropped = (inputs - 2 * h - i) * c + inputs * (1 if micro.cuda else c) if micro.dropout else 0
    cast = 0
    if micro.adapter_bytes > c and not micro.cuda:
        # On a CPU peft casts each adapter's input to the adapter's dtype and autocast casts it
        # back, so no input is shared. With dropout the masks are in 32 bits, too; that sum was
        # counted on two shapes and not derived.
        cast = c * (5 * h - shape.linears()["k_proj"][1] + i if micro.dropout else 3 * h + q)
    return kept * c + dropped + cast + 4 * (2 * h + shape.heads + 2)


def activation_bytes(shape: Shape, micro: Micro) -> float:
    """Return the bytes that autograd keeps of a whole micro-batch after the forward pass."""
    c, h = micro.compute_bytes, shape.hidden
    block = h * c if micro.checkpoint else block_bytes(shape, micro)
    ends = h * (4 * micro.checkpoint + c)  # the last norm (or in place of the first one), the head
    cast = adapter_parameters(shape, micro.rank) * c if micro.adapter_bytes != c else 0
    return micro.length * (shape.layers * block + ends) + cast


def training_memory(shape: Shape, micro: Micro) -> dict[str, float]:
    """Predict the peak of QLoRA training by part, in GB (1e9 bytes), rather too high than too low.

    Adam keeps two averages a trained number, and those in 8 bits a 32-bit scale for 256 (arXiv
    2110.02861). The loss (trl's chunked one: a tile of logits and the gradient of the last hidden
    states) and a block's backward pass come one after the other: only the larger counts.
    """
    c, adapters = micro.compute_bytes, adapter_parameters(shape, micro.rank)
    norms = shape.parameters - shape.block_parameters - shape.embedding_parameters
    rows = min(micro.length, LOSS_ROWS)
    tile: float = rows * LOSS_COLUMNS * c
    if not micro.cuda:  # no Triton: a handful of further tiles in 32 bits, 8.3 in all (counted)
        tile = 8.3 * 4 * rows * min(shape.vocab, CPU_LOSS_COLUMNS)
    again = block_bytes(shape, micro) if micro.checkpoint else 0
    loss = tile + 4 * micro.length * shape.hidden
    backward = micro.length * (again + shape.intermediate * c)
    unpacked = max(i * o for i, o in shape.linears().values()) * c
    averages = 2 * (micro.adam_bytes + (4 / 256 if micro.adam_bytes == 1 else 0))
    parts = {
        "4-bit weights": shape.block_parameters * bits_per_parameter(double_quant=True) / 8,
        "embeddings and head": (shape.embedding_parameters + norms) * c,
        # each trained number, its gradient and its averages
        "adapters and optimizer": adapters * (2 * micro.adapter_bytes + averages),
        "activations": activation_bytes(shape, micro),
        "temporary": max(loss, backward) + unpacked,
        "CUDA context" if micro.cuda else "Python and libraries": BASE_GB * 1e9,
    }
    return {name: size / 1e9 for name, size in parts.items()}
