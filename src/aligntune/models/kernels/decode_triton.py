"""The CUDA kernels of a decode step: attention of one token a row over the static cache, and the draw of the next token."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DECODE_BLOCK, DECODE_WARPS, DECODE_STAGES = 128, 4, 2  # half the block for heads larger than 64
SEGMENT, DRAW_BLOCK, DRAW_WARPS = 4096, 4096, 8


@triton.jit
def _decode_attention_kernel(
    query, key, value, keys, values, out, positions, scale, window,
    q_row, q_head, k_row, k_head, v_row, v_head, cache_row, cache_head, cache_row_v, cache_head_v, o_row, o_head,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    DIM_V: tl.constexpr, DIM_V_PAD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One program: one row, one key-value head, its GROUP query heads. Online softmax over the row's past; the new
    token's key and value come from registers and are stored behind the past."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    past = tl.load(positions + row)
    group, dim, dim_v = tl.arange(0, GROUP_PAD), tl.arange(0, DIM_PAD), tl.arange(0, DIM_V_PAD)
    in_dim, in_dim_v, in_group = dim < DIM, dim_v < DIM_V, group < GROUP
    k_new = tl.load(key + row * k_row + head * k_head + dim, mask=in_dim, other=0.0)
    v_new = tl.load(value + row * v_row + head * v_head + dim_v, mask=in_dim_v, other=0.0)
    key_base = keys + row * cache_row + head * cache_head
    value_base = values + row * cache_row_v + head * cache_head_v
    tl.store(key_base + past * DIM + dim, k_new, mask=in_dim)
    tl.store(value_base + past * DIM_V + dim_v, v_new, mask=in_dim_v)
    q_at = query + row * q_row + (head * GROUP + group)[:, None] * q_head + dim[None, :]
    q = tl.load(q_at, mask=in_group[:, None] & in_dim[None, :], other=0.0)
    top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
    total = tl.full([GROUP_PAD], 1.0, tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM_V_PAD], tl.float32) + v_new.to(tl.float32)[None, :]
    first = past * 0
    if window > 0:
        first = tl.maximum(past - window + 1, 0)
    for start in range(first // BLOCK * BLOCK, past, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = (place < past) & (place >= first)
        k = tl.load(key_base + place[None, :] * DIM + dim[:, None], mask=inside[None, :] & in_dim[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        decay, p = tl.exp(top - new_top), tl.exp(scores - new_top[:, None])
        v = tl.load(
            value_base + place[:, None] * DIM_V + dim_v[None, :], mask=inside[:, None] & in_dim_v[None, :], other=0.0
        )
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        total = total * decay + tl.sum(p, 1)
        top = new_top
    o_at = out + row * o_row + (head * GROUP + group)[:, None] * o_head + dim_v[None, :]
    tl.store(o_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=in_group[:, None] & in_dim_v[None, :])


@torch.library.custom_op("aligntune::decode_attention", mutates_args={"keys", "values"})
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Append a token and attend: `query` `[b, Hq, D]`, `key` `[b, Hk, D]`, `value` `[b, Hk, Dv]`, buffers
    `[R, Hk, S, D]` and `[R, Hk, S, Dv]`, `positions` `[b]` tokens already there. `window` 0 is none. Returns `[b, Hq, Dv]`."""
    rows, heads, size = query.shape
    kv_heads, size_v = keys.shape[1], values.shape[3]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = query.new_empty(rows, heads, size_v)
    group = heads // kv_heads
    _decode_attention_kernel[(rows, kv_heads)](
        query, key, value, keys, values, out, positions, scale, window,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), out.stride(0), out.stride(1),
        GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)), DIM=size, DIM_PAD=max(16, triton.next_power_of_2(size)),
        DIM_V=size_v, DIM_V_PAD=max(16, triton.next_power_of_2(size_v)), BLOCK=DECODE_BLOCK if size <= 64 else DECODE_BLOCK // 2,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=DECODE_WARPS, num_stages=DECODE_STAGES,
    )  # fmt: skip
    return out


@decode_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], values.shape[3])


@triton.jit
def _segment_kernel(
    scores,
    stride,
    tops,
    totals,
    places,
    vocab: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    GREEDY: tl.constexpr,
) -> None:
    """One program: one row, one segment of the vocabulary; its maximum, the sum of `exp(y - maximum)`, and the place of
    the maximum (the first of equals) when greedy."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scores += row * stride
    first = segment * SEGMENT
    top = -float("inf")
    total = 0.0
    place = first * 0 + vocab
    for start in range(0, SEGMENT, BLOCK):
        column = first + start + tl.arange(0, BLOCK)
        inside = (column < vocab) & (column < first + SEGMENT)
        y = tl.load(scores + column, mask=inside, other=-float("inf"))
        block_top = tl.max(y)
        if GREEDY:
            block_place = tl.min(tl.where(inside & (y == block_top), column, vocab))
            place = tl.where(block_top > top, block_place, place)
        new_top = tl.maximum(tl.maximum(top, block_top), -1e30)  # a segment of -inf has sum 0, not NaN
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(y - new_top))
        top = new_top
    at = row * tl.num_programs(1) + segment
    tl.store(tops + at, top)
    tl.store(totals + at, total)
    if GREEDY:
        tl.store(places + at, place)


@triton.jit
def _choose_kernel(
    scores, stride, tops, totals, places, tokens, log_probs, seed, row_ids, step,
    vocab: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENTS_PAD: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr, GREEDY: tl.constexpr,
) -> None:  # fmt: skip
    """One program a row: log-sum-exp from the segments, then the token where the distribution function passes a uniform
    random number: first the segment, then the place in it (the best segment's best place when greedy)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SEGMENTS_PAD)
    held = lane < SEGMENTS
    top = tl.load(tops + row * SEGMENTS + lane, mask=held, other=-float("inf"))
    total = tl.load(totals + row * SEGMENTS + lane, mask=held, other=0.0)
    highest = tl.max(top)
    mass = tl.where(held, total * tl.exp(top - highest), 0.0)
    log_sum_exp = highest + tl.log(tl.sum(mass))
    if GREEDY:
        place = tl.load(places + row * SEGMENTS + lane, mask=held, other=vocab)
        winner = tl.min(tl.where(held & (top == highest), place, vocab))
    else:
        # one stream of random numbers for each (seed, row, step), whatever else is in the batch
        stream = tl.load(seed) + (tl.load(row_ids + row) * 1048576 + tl.load(step)) * -7046029254386353131
        cumulative = tl.cumsum(mass, 0)
        uniform = tl.sum(tl.where(lane == 0, tl.rand(stream, lane), 0.0))
        wanted = uniform * tl.sum(mass)
        passed = held & (cumulative > wanted) & (mass > 0.0)
        last = tl.max(tl.where(mass > 0.0, lane, 0))  # where rounding leaves none
        segment = tl.minimum(tl.min(tl.where(passed, lane, SEGMENTS_PAD)), last)
        before = tl.sum(tl.where(lane < segment, mass, 0.0))
        first = segment * SEGMENT
        winner = first * 0 + vocab
        fallback = first * 0
        for start in range(0, SEGMENT, BLOCK):
            column = first + start + tl.arange(0, BLOCK)
            inside = (column < vocab) & (column < first + SEGMENT)
            y = tl.load(scores + row * stride + column, mask=inside, other=-float("inf"))
            p = tl.exp(y - highest)
            reached = before + tl.cumsum(p, 0)
            winner = tl.minimum(winner, tl.min(tl.where((reached > wanted) & (p > 0.0), column, vocab)))
            fallback = tl.maximum(fallback, tl.max(tl.where(p > 0.0, column, 0)))
            before += tl.sum(p)
        winner = tl.where(winner == vocab, fallback, winner)
    tl.store(tokens + row, winner.to(tl.int64))
    tl.store(log_probs + row, tl.load(scores + row * stride + winner) - log_sum_exp)


def draw_rows(scores: Tensor, seed: Tensor, row_ids: Tensor, step: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    """`[b]` tokens drawn from `softmax(scores)` (the argmax, the first of equals, when greedy) and their
    log-probabilities; `scores` `[b, V]` float32. The draw of a row depends on (`seed`, its `row_ids`, `step`) alone."""
    rows, vocab = scores.shape
    segments = triton.cdiv(vocab, SEGMENT)
    tokens = torch.empty(rows, dtype=torch.int64, device=scores.device)
    log_probs, tops, totals = (torch.empty(rows, n, device=scores.device) for n in (1, segments, segments))
    places = torch.empty(rows, segments, dtype=torch.int32, device=scores.device)
    shape = {"vocab": vocab, "SEGMENT": SEGMENT, "BLOCK": DRAW_BLOCK, "GREEDY": greedy}
    _segment_kernel[(rows, segments)](scores, scores.stride(0), tops, totals, places, **shape, num_warps=DRAW_WARPS)
    _choose_kernel[(rows,)](
        scores, scores.stride(0), tops, totals, places, tokens, log_probs, seed, row_ids, step,
        SEGMENTS=segments, SEGMENTS_PAD=triton.next_power_of_2(segments), **shape, num_warps=DRAW_WARPS,
    )  # fmt: skip
    return tokens, log_probs.squeeze(1)
