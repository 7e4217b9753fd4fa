"""The GPU kernel of `entropy_attention`, in Triton: forward and backward fused, nothing of size T x S in memory.

Notation as in `attention.py`: s logits of scaled queries, p = exp(s - L), L log-normaliser, H entropy. Online over
blocks of keys with m the largest logit so far: l = sum exp(s - m), w = sum exp(s - m) (s - m); a new maximum
m + delta turns l into e^-delta l and w into e^-delta (w - delta l). In the end L = m + log l, H = log l - w / l, all in
float32. The backward adds one elementwise term: dS = p (dP - rowsum(g_O O) - g_H (log p + H)).

With TRITON_INTERPRET=1 the same code runs on the CPU, slowly; that is how it is tested without a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropi.entropy.native import contiguous_rows, make_differentiable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MASKED = tl.constexpr(-1.0e30)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _configs() -> list[Any]:
    if INTERPRETED:  # nothing to tune; small blocks reach every branch on small tensors
        return [triton.Config({"ROWS": 32, "KEYS": 32})]
    return [
        triton.Config({"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=stages)
        for rows, keys, warps, stages in (
            (64, 32, 4, 2),
            (64, 64, 4, 3),
            (128, 32, 4, 3),
            (128, 64, 4, 3),
            (128, 64, 8, 3),
            (128, 128, 8, 2),
        )
    ]


@triton.jit
def _block(base, batch, head, row, rows, count, batch_stride, head_stride, row_stride, columns, width):
    """Pointers to a block of rows of a (B, H, T, D) tensor, and which of them exist."""
    where = base + batch * batch_stride + head * head_stride + (row + rows)[:, None] * row_stride + columns[None, :]
    return where, ((row + rows) < count)[:, None] & (columns < width)[None, :]


@triton.jit
def _logits(
    q, k, MASK, batch, head, row, rows, col, cols, T, S, mb, mh, mr, mc,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R, C) masked logits in float32; hidden ones are MASKED."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    t = row + rows[:, None]
    j = col + cols[None, :]
    seen = (j < S) & (t < T)
    if CAUSAL:
        seen = seen & (j <= t + (S - T))
    if MASK_KIND == 1:
        visible = tl.load(MASK + batch * mb + head * mh + t * mr + j * mc, mask=seen, other=0)
        seen = seen & (visible != 0)
    if MASK_KIND == 2:
        s += tl.load(MASK + batch * mb + head * mh + t * mr + j * mc, mask=seen, other=0.0)
        s = tl.where(s < MASKED, MASKED, s)
    return tl.where(seen, s, MASKED)


@triton.autotune(configs=_configs(), key=["T", "S", "D", "CAUSAL"])
@triton.jit
def _forward_kernel(
    Q, K, V, MASK, OUT, ENTROPY, LOG_NORMALISER,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, mb, mh, mr, mc,
    HEADS, T, S,
    D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    rows, cols, columns = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, PADDED)
    where, exists = _block(Q, batch, head, row, rows, T, qb, qh, qt, columns, D)
    q = tl.load(where, mask=exists, other=0.0)
    m = tl.full((ROWS,), MASKED, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)  # noqa: E741
    w = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, PADDED), tl.float32)
    end = S
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(S, row + ROWS + (S - T)))
    for col in range(0, end, KEYS):
        where, exists = _block(K, batch, head, col, cols, S, kb, kh, kt, columns, D)
        k = tl.load(where, mask=exists, other=0.0)
        where, exists = _block(V, batch, head, col, cols, S, vb, vh, vt, columns, D)
        v = tl.load(where, mask=exists, other=0.0)
        s = _logits(q, k, MASK, batch, head, row, rows, col, cols, T, S, mb, mh, mr, mc, CAUSAL, MASK_KIND, PRECISION)
        largest = tl.maximum(m, tl.max(s, 1))
        delta = tl.maximum(m - largest, -88.0)  # m is MASKED before the first visible key, and l and w are 0
        factor = tl.exp(delta)
        # Rows that have seen nothing yet would otherwise find exp(MASKED - MASKED) = 1; what is not a number stays.
        shifted = tl.where(s <= MASKED / 2, MASKED, s - largest[:, None])
        e = tl.exp(shifted)
        w = factor * (w + delta * l) + tl.sum(e * tl.maximum(shifted, -88.0), 1)
        l = factor * l + tl.sum(e, 1)  # noqa: E741
        out = out * factor[:, None] + tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
        m = largest
    sees = l != 0
    total = tl.where(sees, l, 1.0)
    entropy = tl.where(sees, tl.log(total) - w / total, 0.0)
    entropy = tl.where(entropy < 0, 0.0, entropy)
    at = (batch * HEADS + head) * T + row + rows
    tl.store(ENTROPY + at, entropy, mask=row + rows < T)
    tl.store(LOG_NORMALISER + at, tl.where(sees, m + tl.log(total), MASKED), mask=row + rows < T)
    where, exists = _block(OUT, batch, head, row, rows, T, ob, oh, ot, columns, D)
    tl.store(where, (out / total[:, None]).to(OUT.dtype.element_ty), mask=exists)


@triton.jit
def _slopes(s, dp, log_normaliser, row_sum, grad_entropy):
    """p and dS of a block; `row_sum` is rowsum(g_O O) + g_H H."""
    log_p = s - log_normaliser[:, None]
    log_p = tl.where(log_p > 0.0, 0.0, log_p)  # rounding may leave it a little above 0
    p = tl.where((s <= MASKED / 2) | (log_normaliser <= MASKED / 2)[:, None], 0.0, tl.exp(log_p))
    return p, p * (dp - row_sum[:, None] - grad_entropy[:, None] * tl.maximum(log_p, -88.0))


@triton.autotune(configs=_configs(), key=["T", "S", "D", "CAUSAL"])
@triton.jit
def _backward_query_kernel(
    Q, K, V, MASK, GO, DQ, LOG_NORMALISER, ROW_SUM, GRAD_ENTROPY,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, db, dh, dt, mb, mh, mr, mc,
    HEADS, T, S,
    D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    rows, cols, columns = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, PADDED)
    where, exists = _block(Q, batch, head, row, rows, T, qb, qh, qt, columns, D)
    q = tl.load(where, mask=exists, other=0.0)
    where, exists = _block(GO, batch, head, row, rows, T, gb, gh, gt, columns, D)
    g = tl.load(where, mask=exists, other=0.0)
    at = (batch * HEADS + head) * T + row + rows
    log_normaliser = tl.load(LOG_NORMALISER + at, mask=row + rows < T, other=MASKED)
    row_sum = tl.load(ROW_SUM + at, mask=row + rows < T, other=0.0)
    grad_entropy = tl.load(GRAD_ENTROPY + at, mask=row + rows < T, other=0.0)
    dq = tl.zeros((ROWS, PADDED), tl.float32)
    end = S
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(S, row + ROWS + (S - T)))
    for col in range(0, end, KEYS):
        where, exists = _block(K, batch, head, col, cols, S, kb, kh, kt, columns, D)
        k = tl.load(where, mask=exists, other=0.0)
        where, exists = _block(V, batch, head, col, cols, S, vb, vh, vt, columns, D)
        v = tl.load(where, mask=exists, other=0.0)
        s = _logits(q, k, MASK, batch, head, row, rows, col, cols, T, S, mb, mh, mr, mc, CAUSAL, MASK_KIND, PRECISION)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        _, ds = _slopes(s, dp, log_normaliser, row_sum, grad_entropy)
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    where, exists = _block(DQ, batch, head, row, rows, T, db, dh, dt, columns, D)
    tl.store(where, dq.to(DQ.dtype.element_ty), mask=exists)


@triton.autotune(configs=_configs(), key=["T", "S", "D", "CAUSAL"])
@triton.jit
def _backward_key_kernel(
    Q, K, V, MASK, GO, DK, DV, LOG_NORMALISER, ROW_SUM, GRAD_ENTROPY,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, db, dh, dt, mb, mh, mr, mc,
    HEADS, T, S,
    D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * KEYS
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    rows, cols, columns = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, PADDED)
    where, exists = _block(K, batch, head, col, cols, S, kb, kh, kt, columns, D)
    k = tl.load(where, mask=exists, other=0.0)
    where, exists = _block(V, batch, head, col, cols, S, vb, vh, vt, columns, D)
    v = tl.load(where, mask=exists, other=0.0)
    dk = tl.zeros((KEYS, PADDED), tl.float32)
    dv = tl.zeros((KEYS, PADDED), tl.float32)
    begin = 0
    if CAUSAL:  # the first row that sees this block
        begin = tl.maximum(0, col - (S - T)) // ROWS * ROWS
    for row in range(begin, T, ROWS):
        where, exists = _block(Q, batch, head, row, rows, T, qb, qh, qt, columns, D)
        q = tl.load(where, mask=exists, other=0.0)
        where, exists = _block(GO, batch, head, row, rows, T, gb, gh, gt, columns, D)
        g = tl.load(where, mask=exists, other=0.0)
        at = (batch * HEADS + head) * T + row + rows
        log_normaliser = tl.load(LOG_NORMALISER + at, mask=row + rows < T, other=MASKED)
        row_sum = tl.load(ROW_SUM + at, mask=row + rows < T, other=0.0)
        grad_entropy = tl.load(GRAD_ENTROPY + at, mask=row + rows < T, other=0.0)
        s = _logits(q, k, MASK, batch, head, row, rows, col, cols, T, S, mb, mh, mr, mc, CAUSAL, MASK_KIND, PRECISION)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        p, ds = _slopes(s, dp, log_normaliser, row_sum, grad_entropy)
        dv += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    where, exists = _block(DK, batch, head, col, cols, S, db, dh, dt, columns, D)
    tl.store(where, dk.to(DK.dtype.element_ty), mask=exists)
    where, exists = _block(DV, batch, head, col, cols, S, db, dh, dt, columns, D)
    tl.store(where, dv.to(DV.dtype.element_ty), mask=exists)


def _mask_arguments(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    """The mask as the kernels read it, its strides (0 where it is broadcast), and its kind."""
    if mask is None:
        return query, (0, 0, 0, 0), 0
    kind = 1 if mask.dtype == torch.bool else 2
    mask = mask.to(torch.uint8) if kind == 1 else mask.float()
    mask = mask.expand(*query.shape[:3], key.shape[2])
    return mask, mask.stride(), kind


def _constants(query: Tensor, causal: bool, mask_kind: int) -> dict[str, Any]:
    width = query.shape[3]
    return {
        "D": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "CAUSAL": causal,
        "MASK_KIND": mask_kind,
        # float32 products are exact ones, not tf32: the entropy of sharp rows needs the digits.
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }


@torch.library.custom_op("entropi::attention_triton", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `(B, H, T, D)`, entropy and log-normaliser `(B, H, T)` of scaled queries."""
    query, key, value = contiguous_rows(query), contiguous_rows(key), contiguous_rows(value)
    batch, heads, length, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    entropy = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    log_normaliser = torch.empty_like(entropy)
    mask_data, mask_strides, mask_kind = _mask_arguments(mask, query, key)
    strides = [s for x in (query, key, value, output) for s in x.stride()[:3]]
    _forward_kernel[lambda meta: (triton.cdiv(length, meta["ROWS"]), batch * heads)](
        query, key, value, mask_data, output, entropy, log_normaliser,
        *strides, *mask_strides, heads, length, key.shape[2], **_constants(query, causal, mask_kind),
    )  # fmt: skip
    return output, entropy, log_normaliser


@torch.library.custom_op("entropi::attention_triton_backward", mutates_args=())
def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    output: Tensor,
    entropy: Tensor,
    log_normaliser: Tensor,
    grad_output: Tensor,
    grad_entropy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    query, key, value, grad_output = (
        contiguous_rows(query),
        contiguous_rows(key),
        contiguous_rows(value),
        contiguous_rows(grad_output),
    )
    batch, heads, length, _ = query.shape
    row_sum = (grad_output.float() * output.float()).sum(-1) + grad_entropy * entropy
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    mask_data, mask_strides, mask_kind = _mask_arguments(mask, query, key)
    shared = [s for x in (query, key, value, grad_output) for s in x.stride()[:3]]
    rest = (*mask_strides, heads, length, key.shape[2])
    constants = _constants(query, causal, mask_kind)
    _backward_query_kernel[lambda meta: (triton.cdiv(length, meta["ROWS"]), batch * heads)](
        query, key, value, mask_data, grad_output, grads[0], log_normaliser, row_sum, grad_entropy,
        *shared, *grads[0].stride()[:3], *rest, **constants,
    )  # fmt: skip
    _backward_key_kernel[lambda meta: (triton.cdiv(key.shape[2], meta["KEYS"]), batch * heads)](
        query, key, value, mask_data, grad_output, grads[1], grads[2], log_normaliser, row_sum, grad_entropy,
        *shared, *grads[1].stride()[:3], *rest, **constants,
    )  # fmt: skip
    return grads[0], grads[1], grads[2]


make_differentiable(attention, attention_backward)
