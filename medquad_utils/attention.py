"""Attention over packed rows by torch's variable-length kernel, FlashAttention-2 inside torch.

A packed row holds several examples. SDPA compares each token with the whole row and masks the rest:
at 4,096 tokens and 8 B that is 17 % of all FLOP. The kernel computes each example alone. It needs
compute capability 8.0; what it does not cover goes through SDPA as before.
"""

from __future__ import annotations

from typing import Any

import torch

from medquad_utils.profiles import VARLEN


def register() -> None:
    """Make ``attn_implementation="medquad_varlen"`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(VARLEN, attend)
    # Padded rows and generation go through SDPA and need its mask.
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, *, cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0, **others: Any,
) -> Any:  # fmt: skip
    """Attend within each example of a packed row: (1, heads, tokens, size) -> (1, tokens, ...).

    TRL's collator passes ``cu_seq_lens_q``, where each example begins, and the longest of them.
    Without these it is SDPA.
    """
    from torch.nn.attention import varlen
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    starts, longest = (cu_seq_lens_q,) * 2, (max_length_q,) * 2  # of queries and of keys
    # A window of all tokens to the left and none to the right is the causal mask.
    how: Any = {"scale": others["scaling"], "window_size": (-1, 0), "enable_gqa": True}
    alone: Any = varlen.varlen_attn(q, k, v, *starts, *longest, **how)
    return alone[None], None
