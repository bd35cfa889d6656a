"""What training costs: the arithmetic against autograd, tensors and torch's count of FLOP."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import stamp
import torch
from conftest import benchmark
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medquad_utils import (
    cli,
    data,
    estimate,
    generation,
    memory,
    profiles,
    splits,
    training,
)
from medquad_utils.estimate import CARDS, attention_flops, flops_per_token
from medquad_utils.lora import ALL_LINEAR, trainable_parameters
from medquad_utils.machine import Hardware
from medquad_utils.memory import Micro, Shape, training_memory
from medquad_utils.profiles import PROFILES
from medquad_utils.quantization import measured_memory

BIG = PROFILES["llama-8b"].shape
SMALL = Shape(192, 4, 512, 6, 3, 3072)
WIDE = Shape(256, 3, 8192, 8, 8, 3072, tied=True)  # a block's backward pass outweighs the loss


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors that operations make while they live, and the most at once."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.sizes, self.peak = known, dict[int, int](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self.known | self.sizes.keys():
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return made


def saved_bytes(forward: Any, known: set[int]) -> int:
    """Bytes of the storages that autograd holds after ``forward``, each once, but ``known``."""
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss = forward()
    return sum(storage.nbytes() for key, storage in kept.items() if key not in known)


def small_trainer(shape: Shape, folder: Path, micro: Micro) -> Any:
    """A trainer on a Llama of random weights, with the micro-batch's numbers."""
    hardware = Hardware("cpu", "a CPU", 64.0, bf16_cpu=micro.compute_bytes == 2)
    path = str(benchmark("random_llama").write(shape, folder / "model"))
    plan = profiles.resolve("tiny", hardware=hardware, model=path, out=str(folder / "runs"))
    changes: dict[str, Any] = {"lora_dropout": 0.1 * micro.dropout, "lora_r": micro.rank}
    changes["attention"] = profiles.VARLEN if micro.varlen else "sdpa"
    plan = dataclasses.replace(plan, **changes).with_fit(checkpointing=micro.checkpoint)
    rows = data.prepare(plan)
    few = splits.Splits(rows.train[:4], rows.validation[:4], rows.test[:4])
    tokenizer = generation.load_tokenizer(plan)
    trainer = training.build_trainer(plan, generation.load_base(plan), tokenizer, few)
    if micro.checkpoint:
        trainer.model.get_base_model().activation_checkpointing_enable()
    trainer.model.train()
    return trainer


def packed_row(length: int) -> dict[str, Any]:
    """Random tokens of two documents of the same length, as TRL's collator hands them over."""
    ids = torch.randint(10, 3000, (1, length), generator=torch.Generator().manual_seed(0))
    half = torch.arange(length // 2)
    starts = torch.tensor([0, length // 2, length], dtype=torch.int32)
    ends = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    most = {"max_length_q": length // 2, "max_length_k": length // 2}
    places = {"position_ids": torch.cat([half, half])[None]}
    return {"input_ids": ids, "labels": ids.clone(), **places, **ends, **most}


@pytest.mark.parametrize(
    ("shape", "micro"),
    [
        (SMALL, Micro(64, 8, 4, 4, cuda=False)),
        (SMALL, Micro(320, 16, 4, 4, dropout=True, cuda=False)),
        (SMALL, Micro(288, 8, 4, 4, checkpoint=True, cuda=False)),
        (SMALL, Micro(120, 8, 2, 4, dropout=True, cuda=False)),
        (SMALL, Micro(120, 8, 2, 4, cuda=False)),
        (SMALL, Micro(288, 8, 4, 4, cuda=False, varlen=True)),
        (WIDE, Micro(96, 8, 4, 4, checkpoint=True, dropout=True, cuda=False)),
    ],
)
def test_memory_of_a_step_is_what_autograd_and_the_tensors_say(
    shape: Shape, micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batch = small_trainer(shape, tmp_path, micro), packed_row(micro.length)
    # trl's buffer for logits is as wide for any vocabulary; a CPU never touches the rest
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", shape.vocab)
    tensors = filter(torch.is_tensor, batch.values())
    held = [*trainer.model.parameters(), *trainer.model.buffers(), *tensors]
    storages = [tensor.untyped_storage() for tensor in held]

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=micro.compute_bytes == 2):
            return trainer.compute_loss(trainer.model, dict(batch))

    with benchmark("common").varlen_on_cpu():  # played, it keeps what the kernel keeps
        counted = saved_bytes(forward, {storage.data_ptr() for storage in storages})
        assert memory.activation_bytes(shape, micro) == pytest.approx(counted, rel=0.03)
        with LiveBytes({storage._cdata for storage in storages}) as live:
            forward().backward()
    parts = training_memory(shape, micro)
    gradients = memory.adapter_parameters(shape, micro.rank) * micro.adapter_bytes
    predicted = gradients + (parts["activations"] + parts["temporary"]) * 1e9
    assert predicted == pytest.approx(live.peak, rel=0.15)
    assert predicted > 0.97 * live.peak, "an estimate errs on the high side"


def test_weights_adapters_and_optimizer_are_what_the_tensors_take(tmp_path: Path) -> None:
    micro = Micro(64, 16, 4, 4, cuda=False)
    trainer = small_trainer(SMALL, tmp_path, micro)
    trainer.args.max_steps = 1
    trainer.train()
    parts = {name: gb * 1e9 for name, gb in training_memory(SMALL, micro).items()}
    trained, kinds = trainable_parameters(trainer.model), measured_memory(trainer.model)
    four_bits = kinds["4-bit codes"] + kinds["4-bit scales"]
    assert parts["4-bit weights"] == pytest.approx(four_bits, rel=0.001)
    others = kinds["16/32-bit weights"] - 4 * trained
    assert parts["embeddings and head"] == pytest.approx(others, rel=1e-9)
    states = [t for state in trainer.optimizer.state.values() for t in state.values()]
    averages = sum(t.numel() * t.element_size() for t in states if t.numel() > 1)
    assert parts["adapters and optimizer"] == pytest.approx(2 * 4 * trained + averages)


def test_flops_are_those_that_torch_counts() -> None:
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, rank, length = Shape(64, 2, 128, 4, 4, 512), 8, 32
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, intermediate_size=128,
        num_attention_heads=4, num_key_value_heads=4, attn_implementation="eager",
    )  # fmt: skip
    adapters = LoraConfig(r=rank, target_modules=list(ALL_LINEAR))
    model = get_peft_model(LlamaForCausalLM(config), adapters)
    ids = torch.randint(0, 512, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # Nothing asks for the gradient of the embedding: the first q, k and v leave out one product.
    spared = 2 * length * 3 * 64 * 64
    predicted = length * (flops_per_token(shape, rank=rank) + attention_flops(shape, length))
    predicted -= spared
    assert counter.get_total_flops() == pytest.approx(predicted, rel=0.02)
    assert counter.get_total_flops() < 0.8 * predicted * 6 / 4, "6N would be half as much again"


class Moved(TorchDispatchMode):
    """Count the bytes that operations read and write, without products, attention and views."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read, written = ([t for t in tree_leaves(x) if torch.is_tensor(t)] for x in (args, made))
        known = {t.untyped_storage()._cdata for t in read}
        view = all(t.untyped_storage()._cdata in known for t in written)
        free = name in ("mm", "bmm") or "empty" in name or (view and not func._schema.is_mutable)
        if not free:
            self.total += sum(t.numel() * t.element_size() for t in read + written)
        return made


class Unpacking(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clone()  # as peft does after a 4-bit layer


class SomeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # type: ignore[override]
        return tuple(map(torch.empty_like, ctx.saved_tensors))


@pytest.mark.parametrize("shape", [BIG, SMALL, WIDE])
@pytest.mark.parametrize("dropout", [False, True])
def test_bytes_of_the_other_kernels_are_those_that_a_block_moves(
    shape: Shape, dropout: bool
) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AttentionInterface, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    attend = lambda module, q, k, v, *_, **__: (SomeAttention.apply(q, k, v), None)  # noqa: E731
    AttentionInterface.register("some", attend)
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, head_dim=shape.head_dim,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=8,
        attn_implementation="some",
    )  # fmt: skip
    adapters = LoraConfig(r=8, lora_dropout=0.1 * dropout, target_modules=list(ALL_LINEAR))
    with torch.device("meta"):  # sizes without numbers
        block = inject_adapter_in_model(adapters, LlamaDecoderLayer(config, 0))
        block = block.to("meta", torch.bfloat16).train()
        tokens = torch.empty(1, 512, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.empty(1, 512, shape.head_dim, dtype=torch.bfloat16)
        for name, module in block.named_modules():
            if name.endswith("base_layer"):
                module.__class__, module.weight.requires_grad = Unpacking, False
        with Moved() as moved:
            out = block(tokens * 1, position_embeddings=(angles, angles))
            out.backward(torch.empty_like(out))
    predicted = estimate.elementwise_bytes(shape, Micro(512, 8, dropout=dropout)) / shape.layers
    assert predicted == pytest.approx(moved.total / 512, rel=0.03)


def test_a_plan_packs_what_is_fastest_by_the_estimate() -> None:
    for profile, card in itertools.product(("llama-1b", "llama-8b"), CARDS.values()):
        if not card.capability:
            continue
        chosen = estimate.estimate(profile, card.name, runs=[])
        for length, checkpointing in itertools.product((1024, 2048, 4096, 8192), (False, True)):
            other = estimate.estimate(
                profile, card.name, length=length, checkpointing=checkpointing, runs=[]
            )
            if other.memory_gb <= 0.92 * card.memory_gb:
                assert chosen.tokens_per_second > 0.95 * other.tokens_per_second, str(other)


def test_eight_billion_parameters_by_hand() -> None:
    parts = training_memory(BIG, Micro(1024, 16))
    frozen = parts["4-bit weights"] + parts["embeddings and head"]
    assert frozen == pytest.approx(5.70, abs=0.005)
    n = 6_979_321_856 + 128256 * 4096
    assert flops_per_token(BIG) == 4 * n == pytest.approx(30.0e9, rel=0.002)
    assert flops_per_token(BIG, True) == pytest.approx(44.0e9, rel=0.002), "all blocks twice"
    for card, milliseconds in (("T4", 315), ("L4", 315), ("A100-40", 61), ("H100", 28)):
        seconds = estimate.dequantisation_seconds(BIG, CARDS[card], True)
        assert 1000 * seconds == pytest.approx(milliseconds, rel=0.07), "as reported"
    assert estimate.estimate("llama-8b", "T4", runs=[]).memory_gb < 15


def test_rows_that_no_packed_row_holds_are_not_billed() -> None:
    for length in (128, 512):
        bill = estimate.estimate("llama-8b", "A100-80", length=length, runs=[])
        assert bill.tokens == estimate.TRAINING_PART[length][1]


def test_what_fits_is_what_a_plan_would_take() -> None:
    full = estimate.estimate("llama-8b", "T4", length=1088, runs=[])
    assert profiles.ROOM * 15 < full.memory_gb < 15 and "does not fit" in str(full)


def test_a_measured_run_is_shown_on_its_own_card() -> None:
    from transformers import LlamaConfig

    bill = estimate.estimate("tiny", "CPU", runs=[])
    # transformers fills in head_dim, which the profile leaves out: still the same shape.
    shape = Shape.of(LlamaConfig.from_pretrained(profiles.TINY_MODEL))
    devices = {
        "NVIDIA A100-SXM4-40GB": "A100-40", "NVIDIA A100 80GB PCIe": "A100-80", "CPU": "CPU",
        "Tesla T4": "T4", "NVIDIA L4": "L4", "NVIDIA GeForce RTX 4090": "RTX 4090",
    }  # fmt: skip
    for device, name in devices.items():
        run = estimate.Run("tiny", device, "2026-01-01", shape, bill.micro, 256, 1.25, 99.0)
        assert [card.name for card in CARDS.values() if run.on(card)] == [name]
    measured = estimate.estimate("tiny", "CPU", runs=[dataclasses.replace(run, device="CPU")])
    assert measured.tokens_per_second == 99
    for line in ("1.250 GB  [measured on CPU, 2026-01-01]", "99 real tokens/s  [measured on CPU"):
        assert line in str(measured)


def test_the_page_of_costs_holds_the_table(repo: Path) -> None:
    text = (repo / "notebooks" / "COSTS.md").read_text(encoding="utf-8")
    assert stamp.between(text, stamp.COSTS) == stamp.cost_table()
    measured = any(run.micro.cuda for run in estimate.read_runs())
    others = (repo / "README.md", repo / "tests" / "benchmarks" / "README.md")
    for page in (text, *(other.read_text(encoding="utf-8") for other in others)):
        assert ("No GPU has been measured yet" in " ".join(page.split())) != measured


@pytest.mark.parametrize(
    ("options", "config", "expected"),
    [
        ("--gpu T5", "", "unknown card 'T5': expected T4, L4, A10G, A100-40"),
        ("--price nan", "", "--price=nan: expected"),
        ("--out bar.txt", "", "--out 'bar.txt'"),
        ("--model nowhere.json", "", "model 'nowhere.json': expected OWNER/NAME"),
        ("", '{"model_type": "gpt2"}', "no attribute 'intermediate_size'). Expected OWNER/NAME or"),
        ("", '{"model_type": "mixtral"}', "its sizes cannot be read (a mixtral has experts"),
        ("", '{"model_type": "llama", "vocab_size": "x"}', "its sizes cannot be read"),
    ],
)
def test_a_mistake_of_the_estimate_ends_in_one_line(
    options: str, config: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if config:
        (tmp_path / "config.json").write_text(config)
        options = f"--model {tmp_path}"
    assert cli.main(["estimate", *options.split()]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert expected in said.err


def test_the_command_prints_memory_time_and_price(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["estimate", "--gpu", "t4", "--price", "0.5"]) == 0
    said = capsys.readouterr().out
    for wanted in ("4-bit weights", "CUDA context", "fits", "tokens/s", "0.50 an hour",
                   "min for 3,166,147 tokens of MedQuAD", "[estimate]"):  # fmt: skip
        assert wanted in said
    drawn = ["--model", str(profiles.TINY_MODEL / "config.json"), "--out", f"{tmp_path}/a.png"]
    for _ in "ab":  # the second picture replaces the first
        assert cli.main(["estimate", *drawn]) == 0
        said = capsys.readouterr().out
        assert said.startswith("tiny, 4 M parameters, on T4 (15 GB)")
        assert said.endswith(f"written: {tmp_path / 'a.png'}\n")
