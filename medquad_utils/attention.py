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
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int = 0, **others: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend within each example of a packed row: (1, heads, tokens, size) -> (1, tokens, ...).

    TRL's collator passes ``cu_seq_lens_q``, where each example begins, and the longest of them.
    Without these it is SDPA.
    """
    from torch.nn.attention import varlen
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        settings = {"dropout": dropout, "scaling": scaling, **others}
        output: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, **settings
        )[0]
        return output, None
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    starts, longest = (cu_seq_lens_q,) * 2, (max_length_q,) * 2  # of queries and of keys
    causal = (-1, 0)  # a window: all tokens to the left, none to the right
    alone: Any = varlen.varlen_attn(
        q, k, v, *starts, *longest, scale=scaling, window_size=causal, enable_gqa=True
    )
    return alone[None], None
