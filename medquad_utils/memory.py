"""What training a Llama in 4 bits takes in memory, part by part, from its sizes alone; imports nothing of ours, and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BLOCK = 64  # weights that share one scale
SUPER_BLOCK = 256  # scales that share one scale of scales
NF4_CODE_BITS = 4
LOSS_ROWS, LOSS_COLUMNS = (
    4096,
    32768,
)  # tokens and vocabulary of one tile of logits: trl 1.16, kernels/chunked_logprob.py
BASE_GB = (
    0.8  # CUDA context and cuBLAS workspaces, or Python and its libraries on a CPU; an assumption
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama that parameter counts and memory are computed from."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    head_dim: int = 0

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a ``transformers.LlamaConfig`` (or any config with its field names)."""
        return cls(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
            head_dim=getattr(config, "head_dim", 0) or 0,
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of the seven linear layers of one block."""
        head = self.head_dim or self.hidden // self.heads
        return {
            "q_proj": (self.hidden, self.heads * head),
            "k_proj": (self.hidden, self.kv_heads * head),
            "v_proj": (self.hidden, self.kv_heads * head),
            "o_proj": (self.heads * head, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def block_parameters(self) -> int:
        """Weights in the linear layers of all blocks: what 4-bit quantisation packs."""
        return self.layers * sum(i * o for i, o in self.linears().values())

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding and of the head (once if they are tied): these stay in 16 or 32 bits."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights, the norms included."""
        return (
            self.block_parameters + self.embedding_parameters + self.hidden * (2 * self.layers + 1)
        )


def bits_per_parameter(
    double_quant: bool, block: int = BLOCK, super_block: int = SUPER_BLOCK
) -> float:
    """Stored bits a quantised weight costs: 4 for the code, the rest for the scales (8-bit ones with ``double_quant``).

    QLoRA, arXiv 2305.14314, section 3.
    """
    return NF4_CODE_BITS + (8 / block + 32 / (block * super_block) if double_quant else 32 / block)


@dataclass(frozen=True)
class Micro:
    """One micro-batch and the numbers that it is computed in.

    ``checkpoint`` keeps only the input of every n-th block and computes the rest a second time: 0 is off, 1 is every
    block. With ``compact`` numbers (16 bits) the norms still save their inputs in 32.
    """

    rows: int  # rows of the micro-batch: 1 if they are packed
    length: int  # tokens of a row, its padding included
    rank: int
    compute_bytes: int = 2
    adapter_bytes: int = 2
    checkpoint: int = 0
    dropout: bool = False  # whether the adapters' inputs are thinned out
    cuda: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch, padding included."""
        return self.rows * self.length


# All seven linear layers of a block: the QLoRA paper (section 4) finds that this matters more than the rank.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_parameters(shape: Shape, rank: int, modules: tuple[str, ...] = ALL_LINEAR) -> int:
    """Trainable parameters in closed form: a layer with i inputs and o outputs gets rank x (i + o)."""
    return shape.layers * sum(
        rank * (i + o) for name, (i, o) in shape.linears().items() if name in modules
    )


def block_bytes(shape: Shape, micro: Micro) -> float:
    """Bytes for each token that autograd keeps of one block between forward and backward pass, without checkpointing.

    Read off what ``saved_tensors_hooks`` sees of transformers 5.23's Llama under peft 0.21 (tests/test_estimate.py counts
    again). In the compute dtype: the inputs of the adapters of q, k and v (one, shared), of o (which is what attention
    gave), of gate and up (one, shared) and of down; gate, up and SiLU's output; q and, since a row's mask forbids native
    grouped attention, k and v repeated for every head; the seven narrow outputs of ``lora_A``; a row of the mask. In 32
    bits: both norms' inputs, a log-sum-exp a head. Dropout gives every adapter a copy of its own and a mask: a byte a
    value on CUDA, as wide as the value on a CPU.
    """
    c, h, i, q = micro.compute_bytes, shape.hidden, shape.intermediate, shape.linears()["o_proj"][0]
    kept = 4 * i + 2 * h + 4 * q + 7 * micro.rank + micro.length
    inputs = 5 * h + q + i
    # With dropout the shared inputs are not needed any more, but attention still keeps what it gave to o.
    thinned = (inputs - 2 * h - i) * c + inputs * (1 if micro.cuda else c) if micro.dropout else 0
    cast = 0
    if micro.adapter_bytes > c and not micro.cuda:
        # On a CPU peft casts each adapter's input to the adapter's dtype and autocast casts it back, so no input is shared.
        # With dropout the masks are in 32 bits too; that sum was counted on two shapes and not derived.
        cast = c * (5 * h - shape.linears()["k_proj"][1] + i if micro.dropout else 3 * h + q)
    return kept * c + thinned + cast + 4 * (2 * h + shape.heads + 2)


def activation_bytes(shape: Shape, micro: Micro) -> float:
    """Bytes that autograd keeps of a whole micro-batch when the forward pass ends, parameters not counted."""
    inputs = -(-shape.layers // micro.checkpoint) if micro.checkpoint else 0
    blocks = (shape.layers - inputs) * block_bytes(
        shape, micro
    ) + inputs * shape.hidden * micro.compute_bytes
    ends = shape.hidden * (
        (4 if inputs else 0) + micro.compute_bytes
    )  # last norm (else in place of the first one), head
    copies = (
        adapter_parameters(shape, micro.rank) * micro.compute_bytes
        if micro.adapter_bytes != micro.compute_bytes
        else 0
    )
    return micro.tokens * (blocks + ends) + copies


def loss_bytes(shape: Shape, micro: Micro) -> float:
    """Bytes that trl's chunked loss holds for a moment: a tile of logits and the gradient of the last hidden states in 32 bits.

    On a CPU, which has no Triton, a handful of further tiles in 32 bits stands beside it (8.3 in all, counted).
    """
    tokens = min(micro.tokens, LOSS_ROWS)
    gradient = 4 * micro.tokens * shape.hidden
    if micro.cuda:
        return tokens * LOSS_COLUMNS * micro.compute_bytes + gradient
    return 8.3 * 4 * tokens * min(shape.vocab, LOSS_COLUMNS) + gradient


def backward_bytes(shape: Shape, micro: Micro) -> float:
    """Bytes that the backward pass of one block holds for a moment: what checkpointing computes again, and gradients."""
    again = block_bytes(shape, micro) if micro.checkpoint else 0
    return micro.tokens * (again + shape.intermediate * micro.compute_bytes)


def training_memory(shape: Shape, micro: Micro) -> dict[str, float]:
    """Predicted peak of QLoRA training by part, in GB (1e9 bytes); an estimate, meant to err on the high side.

    Adam keeps two averages of every trained number: in 8 bits, with a 32-bit scale for 256 of them, on CUDA (Dettmers et
    al., arXiv 2110.02861), in the adapter's dtype on a CPU. The loss and a block's backward pass come one after the other,
    so only the larger counts, beside a linear layer's weights unpacked to the compute dtype.
    """
    adapters = adapter_parameters(shape, micro.rank)
    norms = shape.parameters - shape.block_parameters - shape.embedding_parameters
    moment = 1 + 4 / 256 if micro.cuda else micro.adapter_bytes
    loss, backward = loss_bytes(shape, micro), backward_bytes(shape, micro)
    parts = {
        "4-bit weights": shape.block_parameters * NF4_CODE_BITS / 8,
        "quantisation constants": shape.block_parameters
        * (bits_per_parameter(double_quant=True) - NF4_CODE_BITS)
        / 8,
        "embeddings and head": (shape.embedding_parameters + norms) * micro.compute_bytes,
        "adapters": adapters * micro.adapter_bytes,
        "gradients": adapters * micro.adapter_bytes,
        "optimizer": adapters * 2 * moment,
        "activations": activation_bytes(shape, micro),
        "loss or backward pass": max(loss, backward),
        "unpacked weights": max(i * o for i, o in shape.linears().values()) * micro.compute_bytes,
    }
    return {name: size / 1e9 for name, size in parts.items()} | {
        "CUDA context" if micro.cuda else "Python and libraries": BASE_GB
    }


def weights_gb(parts: dict[str, float]) -> float:
    """GB of the frozen model among the parts of ``training_memory``: 5.70 for Llama-3-8B."""
    return sum(
        parts[name] for name in ("4-bit weights", "quantisation constants", "embeddings and head")
    )


def grouped(parts: Mapping[str, float]) -> dict[str, float]:
    """The ten parts in the six that a picture can tell apart."""
    groups = {
        "4-bit weights": ("4-bit weights", "quantisation constants"), "embeddings and head": ("embeddings and head",),
        "adapters and optimizer": ("adapters", "gradients", "optimizer"), "activations": ("activations",),
        "workspace": ("loss or backward pass", "unpacked weights"),
    }  # fmt: skip
    made = {name: sum(parts[part] for part in several) for name, several in groups.items()}
    return made | dict(list(parts.items())[-1:])
