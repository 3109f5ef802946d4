"""Attention over packed rows by the members' borders, where sdpa would build a mask of T x T.

``varlen`` is torch's own variable-length flash attention, so it needs no further package and is pinned with torch. On
the CPU a loop over the members stands in for the kernel; the kernel itself has not run on a GPU yet.
transformers' ``flash_attention_2`` keeps the members of one row apart, but not those of several rows at once; here rows
are laid end to end, and a border is a border.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Make ``varlen`` known to transformers; as it has no mask function, none is built for it."""
    from transformers import AttentionInterface

    AttentionInterface.register("varlen", attend)


def borders(position_ids: Any) -> Any:
    """(N + 1) int32 offsets into the rows laid end to end: a member starts wherever ``position_ids`` (B, T) are 0."""
    import torch

    flat = position_ids.reshape(-1)
    starts = (flat == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([flat.numel()])]).to(torch.int32)


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    scaling: float | None = None,
    **given: Any,
) -> tuple[Any, None]:
    """Causal attention within each member, as transformers calls it.

    ``query`` is (B, H, T, D), ``key`` and ``value`` (B, KV, T, D); returns (B, T, H, D). The borders come as
    ``cu_seq_lens_q`` and ``max_length_q`` from the collator, or are read from ``position_ids``.
    """
    import torch

    if attention_mask is not None:
        raise ValueError("varlen attention takes no mask: members are kept apart by their borders")
    offsets, longest = given.get("cu_seq_lens_q"), given.get("max_length_q")
    if offsets is None:
        offsets = borders(given["position_ids"])
    if longest is None:
        longest = int(offsets.diff().max())
    kind = query.device.type  # rotary embedding leaves queries and keys in float32 under autocast
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    batch, heads, length, width = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))  # (B T, heads, D)
    if kind == "cpu":
        out = _each_member(q, k, v, offsets, scaling)
    else:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            q,
            k,
            v,
            offsets,
            offsets,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),  # causal
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return out.view(batch, length, heads, width), None


def _each_member(q: Any, k: Any, v: Any, offsets: Any, scale: float | None) -> Any:
    """The same by plain attention on one member after the other."""
    import torch

    parts = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        one = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, heads, T, D)
        part = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(part.squeeze(0).transpose(0, 1))
    return torch.cat(parts)
