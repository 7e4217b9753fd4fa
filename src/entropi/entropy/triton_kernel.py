"""The GPU kernels of `entropy_attention`, in Triton: forward and backward fused, nothing of size T x S in memory.

Notation as in `attention.py`: s logits, p = exp(s - L), L log-sum-exp (`lse`), H entropy. Logarithms are to base 2
inside, as the hardware's exponential is. Online over blocks of keys with m the largest logit so far:
z = sum e, w = sum e log2 e, e = 2^(s / ln 2 - m); a new maximum m + shift turns z into 2^-shift z and w into
2^-shift (w - shift z). In the end L = m + log2 z, H = ln 2 (log2 z - w / z), all in float32. The backward adds one
elementwise term: dS = p (dP - delta - g_H log p), delta = rowsum(g_O O) + g_H H.

Queries come unscaled. Where nothing but the exponential needs the logits, `scale` and the change of base are one factor
of a multiply-add ("unit"); with a softcap, an added mask or another exponential, logits are scaled as soon as they are
computed (SCALED).

With ITERATIONS = t > 0 the exponential is k(x) = (1 + x / 2^t)^(2^t) of x = s - m, logarithms are natural (see
`secure_softmax`). It has no such rule for a new maximum: a first pass over the keys finds m. Then L = log sum k(x). The
backward pass of the queries finds what flows through the row's maximum and hands it to that of the keys.

The backward has a kernel for dQ and another for dK and dV, each with its own logits and dP: seven matrix products. The
five of a single kernel, which adds to dQ atomically, were slower at every size on an H100 (benchmarks/results/gpu.md),
and sums in any order would not be deterministic.

With SOFTCAP = c > 0 logits are c tanh(s / c) before they are masked; the backward multiplies by 1 - tanh^2. A sink is a
logit that is seen first: m and z start with it, and nothing else of a row knows. Values are E wide, queries and keys D.

With POLYNOMIAL = t > 0 the logits become l = 2^t log |1 + s / 2^t| when they are computed, and everything else holds
for them; the backward divides by 1 + s / 2^t.

Blocks in which every row sees every key need no masking and are done in a loop of their own. Elsewhere (MASKED) hidden
logits are MASK_VALUE; m starts at half of that, so that they vanish as exponentials, and rows that see nothing have
L = -MASK_VALUE, so that their p is 0. EVEN lengths, multiples of every block, need no checks at the ends of tensors.

The output and the gradients lie in memory as (B, T, H, D), as models have them before and after they split heads.

With TRITON_INTERPRET=1 the same code runs on the CPU, slowly; that is how it is tested without a GPU.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from entropi.entropy import secure_softmax
from entropi.entropy.operators import (
    as_mean,
    before_mean,
    contiguous_rows,
    make_differentiable,
    row_results,
    squarings,
    with_empty,
)
from entropi.entropy.sinks import gradient as gradient_of_sinks
from entropi.softmax import SoftmaxForm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NUMPY = tl.constexpr(INTERPRETED)  # the interpreter's products are numpy's
MASK_VALUE = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SMALLEST_BASE = tl.constexpr(secure_softmax.SMALLEST_BASE)

LARGEST_BLOCK = 128  # of all tuning choices; EVEN means multiples of it

LAUNCH: dict[str, Any] = {
    "enable_fp_fusion": True
}  # multiply-adds, whatever Triton's default; half of what is elementwise

Choice = tuple[int, int, int, int]

# Tuning choices (ROWS, KEYS, warps, stages) by padded width, or for float32, whose exact products tensor cores do not
# compute. Those of the forward and of dQ at width 64 are the fastest of a sweep on an H100; the others were chosen by
# what they compile to on sm_80 and sm_90, not by time. For the exact softmax at widths 64 and 128 in half precision
# none spills a register, but for the fastest of dQ on sm_80, where there are two others (benchmarks/compiled_kernels.py
# shows it, a test keeps it so).
CHOICES: dict[str, dict[str, tuple[Choice, ...]]] = {
    "forward": {
        "64": ((128, 64, 8, 4), (64, 64, 4, 3), (128, 128, 8, 3)),
        "128": ((128, 64, 8, 3), (64, 32, 4, 2)),
        "256": ((64, 32, 8, 2), (32, 32, 4, 2)),
        "float32": ((32, 32, 8, 2), (32, 32, 4, 2)),
    },
    "backward query": {
        "64": ((64, 128, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3)),
        "128": ((64, 64, 8, 2), (64, 32, 4, 3), (64, 32, 4, 2)),
        "256": ((64, 32, 8, 2), (32, 32, 4, 2)),
        "float32": ((32, 32, 8, 2), (32, 32, 4, 2)),
    },
    "backward key": {
        "64": ((64, 64, 4, 3), (32, 64, 4, 3), (32, 64, 4, 2)),
        "128": ((32, 64, 4, 3), (32, 64, 8, 3), (32, 64, 4, 2)),
        "256": ((32, 64, 8, 2), (32, 32, 4, 2)),
        "float32": ((32, 32, 8, 2), (32, 16, 4, 1)),
    },
}


def choices(kernel: str, padded: int, float32: bool) -> list[Any]:
    """The tuning choices of a kernel for one width, the wider of the two, and precision."""
    if INTERPRETED:  # nothing to tune; small blocks reach every branch on small tensors
        return [triton.Config({"ROWS": 32, "KEYS": 32})]
    kind = "float32" if float32 else "64" if padded <= 64 else "128" if padded == 128 else "256"
    return [triton.Config({"ROWS": r, "KEYS": k}, num_warps=w, num_stages=n) for r, k, w, n in CHOICES[kernel][kind]]


def _tuned(kernel: str) -> Any:
    """Tuning once per dtype, width, kind of attention and order of magnitude of T and S."""
    key = ["SIZE", "PADDED", "PADDED_E", "CAUSAL", "MASK_KIND", "ITERATIONS", "POLYNOMIAL", "SOFTCAP"]

    def chosen(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
        wider = max(constants["PADDED"], constants["PADDED_E"])
        return choices(kernel, wider, arguments["Q"].dtype == torch.float32)

    # More than one configuration, or the tuner would not ask which ones are meant.
    configs = choices(kernel, 64, False)
    prune = {"early_config_prune": chosen} if len(configs) > 1 else None
    return triton.autotune(configs, key, prune_configs_by=prune)


@triton.jit
def _head(base, batch, head, batch_stride, head_stride):
    """Where the (T, D) matrix of one head begins; 64 bits, because whole tensors may pass 2^31 elements."""
    return base + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def _inner_head(base, batch, head, T, HEADS, WIDTH: tl.constexpr):
    """Where one head begins in a tensor that lies in memory as (B, T, H, WIDTH); its rows are HEADS * WIDTH apart."""
    return base + (batch.to(tl.int64) * T * HEADS + head) * WIDTH


@triton.jit
def _read(base, rows, count, stride, D: tl.constexpr, PADDED: tl.constexpr, CHECK: tl.constexpr):
    """Rows of a head's matrix, zeros behind its width and, where they are checked, behind its last row."""
    columns = tl.arange(0, PADDED)
    where = base + rows[:, None] * stride + columns[None, :]
    if CHECK:
        x = tl.load(where, mask=(rows < count)[:, None] & (columns < D)[None, :], other=0.0)
    elif D != PADDED:
        x = tl.load(where, mask=(columns < D)[None, :], other=0.0)
    else:
        x = tl.load(where)
    return x  # [rows, PADDED]


@triton.jit
def _write(base, rows, count, stride, x, D: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    where = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(where, x.to(base.dtype.element_ty), mask=(rows < count)[:, None] & (columns < D)[None, :])


@triton.jit
def _tanh(x):
    """An odd polynomial below 0.625, where the quotient loses digits; relative error below 2e-7."""
    size, z = tl.abs(x), x * x
    e = tl.exp2(size * (-2.0 * LOG2_E))
    quotient = (1.0 - e) / (1.0 + e)
    p = -5.7049867715e-3 * z + 2.0639087005e-2
    p = p * z - 5.3739714996e-2
    p = p * z + 1.3331442197e-1
    p = p * z - 3.3333281942e-1
    return tl.where(size < 0.625, x + x * z * p, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _units(scale, SCALED: tl.constexpr):
    """What turns the logits of `_logits` into those to base 2, and what hidden ones are to come out as MASK_VALUE."""
    unit, hidden = scale * LOG2_E, MASK_VALUE / (scale * LOG2_E)
    if SCALED:
        unit, hidden = scale * 0.0 + LOG2_E, scale * 0.0 + MASK_VALUE
    return unit, hidden


@triton.jit
def _logits(
    q, k, t, j, MASK, scale, hidden, mr, mc, T, S,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, KEYS_DOWN: tl.constexpr = False,
):  # fmt: skip
    """Logits in float32, queries down and keys across or the other way round as t and j, their numbers, broadcast.

    And the softcap's slope, which means something if there is one. Not scaled unless SCALED.
    """
    if not KEYS_DOWN:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
    elif NUMPY:
        # The same sums in the other order: logits would differ from the forward's by a rounding, which sharp rows show.
        s = tl.trans(tl.dot(q, tl.trans(k), input_precision=PRECISION))
    else:
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [KEYS, ROWS]
    if SCALED:
        s = s * scale
    slope = s
    if SOFTCAP > 0:
        y = _tanh(s * (1.0 / SOFTCAP))
        s = y * SOFTCAP
        slope = 1.0 - y * y
    if MASKED:
        visible = j < S
        if CAUSAL:
            visible = visible & (j <= t + (S - T))
        if MASK_KIND == 1:
            visible = visible & (t < T)
            seen = tl.load(MASK + t.to(tl.int64) * mr + j.to(tl.int64) * mc, mask=visible, other=0)
            visible = visible & (seen != 0)
        if MASK_KIND == 2:
            visible = visible & (t < T)
            s += tl.load(MASK + t.to(tl.int64) * mr + j.to(tl.int64) * mc, mask=visible, other=0.0)
            s = tl.where(s < MASK_VALUE, MASK_VALUE, s)
        s = tl.where(visible, s, hidden)
    return s, slope


@triton.jit
def _power(x, ITERATIONS: tl.constexpr, LOWEST: tl.constexpr):
    """k(x) of x <= 0 and its logarithm.

    The last five squarings are of the base u itself, those before of y = u - 1, because u would round away what 2^t
    multiplies: (1 + y)^2 = 1 + y (2 + y).
    """
    PLAIN: tl.constexpr = ITERATIONS if ITERATIONS < 5 else 5
    y = tl.where(x < LOWEST, LOWEST, x) * (1.0 / 2**ITERATIONS)  # what is not a number stays
    for _ in tl.static_range(ITERATIONS - PLAIN):
        y = y * (y + 2.0)
    u = y + 1.0
    log_k = tl.log2(tl.where(u < 1e-30, 1e-30, u)) * (LN_2 * 2**PLAIN)
    for _ in tl.static_range(PLAIN):
        u = u * u
    return u, log_k


@triton.jit
def _polynomial_base(s, POLYNOMIAL: tl.constexpr):
    """1 + s / 2^t, kept from 0."""
    base = s * (1.0 / 2**POLYNOMIAL) + 1.0
    return tl.where(tl.abs(base) < SMALLEST_BASE, SMALLEST_BASE, base)


@triton.jit
def _polynomial_logits(s, POLYNOMIAL: tl.constexpr):
    """l = 2^t log |1 + s / 2^t|; hidden logits stay what they are."""
    log_k = tl.log2(tl.abs(_polynomial_base(s, POLYNOMIAL))) * (LN_2 * 2**POLYNOMIAL)
    return tl.where(s <= MASK_VALUE / 2, s, log_k)


@triton.jit
def _forward_block(
    q, K, V, MASK, m, z, w, out, row, col, scale, kt, vt, mr, mc, T, S,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys into m, z, w and the unnormalised output; with ITERATIONS m is known and stays."""
    rows, keys = row + tl.arange(0, ROWS), col + tl.arange(0, KEYS)
    unit, hidden = _units(scale, SCALED)
    k = _read(K, keys, S, kt, D, PADDED, MASKED and not EVEN)  # [KEYS, PADDED]
    s, _ = _logits(
        q, k, rows[:, None], keys[None, :], MASK, scale, hidden, mr, mc, T, S,
        CAUSAL, MASK_KIND, MASKED, PRECISION, SOFTCAP, SCALED, EVEN,
    )  # fmt: skip
    v = _read(V, keys, S, vt, E, PADDED_E, MASKED and not EVEN)  # [KEYS, PADDED_E]
    if POLYNOMIAL:
        s = _polynomial_logits(s, POLYNOMIAL)
    if ITERATIONS:
        e, log_e = _power(s - m[:, None], ITERATIONS, LOWEST)
        if MASKED:  # clipped keys weigh something for small t, hidden ones never
            e = tl.where(s <= MASK_VALUE / 2, 0.0, e)
    else:
        largest = tl.maximum(m, tl.max(s, 1) * unit)  # [ROWS]
        shift = m - largest
        log_e = s * unit - largest[:, None]
        e = tl.exp2(log_e)  # [ROWS, KEYS]
        factor = tl.exp2(shift)
        w = factor * (w + shift * z)
        z = factor * z
        out = out * factor[:, None]
        m = largest
    w += tl.sum(e * log_e, 1)
    z += tl.sum(e, 1)
    out = tl.dot(e.to(v.dtype), v, out, input_precision=PRECISION)  # [ROWS, PADDED_E]
    return m, z, w, out


@triton.jit
def _largest_block(
    q, K, MASK, m, argmax, row, col, scale, kt, mr, mc, T, S,
    D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The row's largest logit and the first key that has it, over one more block of keys."""
    rows, keys = row + tl.arange(0, ROWS), col + tl.arange(0, KEYS)
    k = _read(K, keys, S, kt, D, PADDED, MASKED and not EVEN)
    s, _ = _logits(
        q, k, rows[:, None], keys[None, :], MASK, scale, MASK_VALUE, mr, mc, T, S,
        CAUSAL, MASK_KIND, MASKED, PRECISION, 0.0, True, EVEN,
    )  # fmt: skip
    largest, place = tl.max(s, 1, return_indices=True)  # [ROWS]
    argmax = tl.where(largest > m, col + place, argmax)
    return tl.maximum(m, largest), argmax


@triton.jit
def _key_ranges(row, T, S, CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Where the blocks that all rows of a block see in full end, and where those that any of them sees end."""
    common, end = S, S
    if CAUSAL:
        common = tl.maximum(0, tl.minimum(S, row + 1 + (S - T)))
        end = tl.maximum(0, tl.minimum(S, row + ROWS + (S - T)))
    middle = common // KEYS * KEYS
    if MASK_KIND != 0:
        middle = 0
    return middle, end


@_tuned("forward")
@triton.jit(do_not_specialize=["SIZE", "HEADS"])
def _forward_kernel(
    Q, K, V, MASK, SINKS, OUT, ENTROPY, LSE, LARGEST, ARGMAX, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, mb, mh, mr, mc, HEADS, T, S, SIZE,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr, EVEN: tl.constexpr, HAS_SINKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, ROWS)
    row = (blocks - 1 - tl.program_id(0) % blocks) * ROWS  # the longest rows of a causal head first
    pair = tl.program_id(0) // blocks
    batch, head = pair // HEADS, pair % HEADS
    rows = row + tl.arange(0, ROWS)
    q = _read(_head(Q, batch, head, qb, qh), rows, T, qt, D, PADDED, not EVEN)  # [ROWS, PADDED]
    K, V = _head(K, batch, head, kb, kh), _head(V, batch, head, vb, vh)
    if MASK_KIND != 0:
        MASK = _head(MASK, batch, head, mb, mh)
    m = tl.full((ROWS,), MASK_VALUE / 2, tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    w = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, PADDED_E), tl.float32)
    middle, end = _key_ranges(row, T, S, CAUSAL, MASK_KIND, ROWS, KEYS)
    at = pair.to(tl.int64) * T + rows

    if HAS_SINKS:
        sink = tl.load(SINKS + at, mask=rows < T, other=MASK_VALUE) * LOG2_E
        m = tl.where(sink <= MASK_VALUE / 2, m, sink)
        z = tl.where(sink <= MASK_VALUE / 2, z, 1.0)

    if ITERATIONS:
        argmax = tl.zeros((ROWS,), tl.int32)
        for col in range(0, middle, KEYS):
            m, argmax = _largest_block(
                q, K, MASK, m, argmax, row, col, scale, kt, mr, mc, T, S,
                D, PADDED, CAUSAL, MASK_KIND, PRECISION, EVEN, ROWS, KEYS, False,
            )  # fmt: skip
        for col in range(middle, end, KEYS):
            m, argmax = _largest_block(
                q, K, MASK, m, argmax, row, col, scale, kt, mr, mc, T, S,
                D, PADDED, CAUSAL, MASK_KIND, PRECISION, EVEN, ROWS, KEYS, True,
            )  # fmt: skip
        tl.store(LARGEST + at, m, mask=rows < T)
        tl.store(ARGMAX + at, argmax, mask=rows < T)

    for col in range(0, middle, KEYS):
        m, z, w, out = _forward_block(
            q, K, V, MASK, m, z, w, out, row, col, scale, kt, vt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP,
            SCALED, EVEN, ROWS, KEYS, False,
        )  # fmt: skip
    for col in range(middle, end, KEYS):
        m, z, w, out = _forward_block(
            q, K, V, MASK, m, z, w, out, row, col, scale, kt, vt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP,
            SCALED, EVEN, ROWS, KEYS, True,
        )  # fmt: skip

    sees = z != 0  # true of what is not a number, which must not be hidden
    total = tl.where(sees, z, 1.0)
    log_total = tl.log2(total)
    if ITERATIONS:
        lse = LN_2 * log_total
        entropy = lse - w / total
    else:
        lse = m + log_total
        entropy = LN_2 * (log_total - w / total)
    entropy = tl.where(sees, tl.where(entropy < 0, 0.0, entropy), 0.0)
    tl.store(ENTROPY + at, entropy, mask=rows < T)
    tl.store(LSE + at, tl.where(sees, lse, -MASK_VALUE), mask=rows < T)
    _write(_inner_head(OUT, batch, head, T, HEADS, E), rows, T, HEADS * E, out / total[:, None], E, PADDED_E)


@triton.jit
def _grad_logits(
    s, slope, dp, lse, delta, grad_entropy, largest, unit,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """p and dS of a block, but for what flows through the row's maximum; delta = rowsum(g_O O) + g_H H."""
    if ITERATIONS:
        x = tl.where(s > largest, 0.0, s - largest)  # another order of summation may exceed the largest
        k, log_k = _power(x, ITERATIONS, LOWEST)
        p = k * tl.exp2(lse * -LOG2_E)
        if MASKED:
            p = tl.where(s <= MASK_VALUE / 2, 0.0, p)
        rate = tl.where(x < LOWEST, 0.0, 1.0 / (1.0 + x * (1.0 / 2**ITERATIONS)))
        ds = p * rate * (dp - delta - grad_entropy * (log_k - lse))
    else:
        if POLYNOMIAL:
            log_p = _polynomial_logits(s, POLYNOMIAL) * LOG2_E - lse
        else:
            log_p = s * unit - lse
        p = tl.exp2(log_p)
        ds = p * (dp - delta - (grad_entropy * LN_2) * log_p)
        if POLYNOMIAL:
            ds = ds / _polynomial_base(s, POLYNOMIAL)
        if SOFTCAP > 0:
            ds = ds * slope
    return p, ds


@triton.jit
def _backward_query_block(
    q, g, K, V, MASK, dq, correction, lse, delta, grad_entropy, largest, row, col, scale, kt, vt, mr, mc, T, S,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys into the unscaled dQ and, with ITERATIONS, into the sums of its dS."""
    rows, keys = row + tl.arange(0, ROWS), col + tl.arange(0, KEYS)
    unit, hidden = _units(scale, SCALED)
    k = _read(K, keys, S, kt, D, PADDED, MASKED and not EVEN)  # [KEYS, PADDED]
    v = _read(V, keys, S, vt, E, PADDED_E, MASKED and not EVEN)  # [KEYS, PADDED_E]
    s, slope = _logits(
        q, k, rows[:, None], keys[None, :], MASK, scale, hidden, mr, mc, T, S,
        CAUSAL, MASK_KIND, MASKED, PRECISION, SOFTCAP, SCALED, EVEN,
    )  # fmt: skip
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)  # [ROWS, KEYS]
    _, ds = _grad_logits(
        s, slope, dp, lse[:, None], delta[:, None], grad_entropy[:, None], largest[:, None], unit,
        ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP, MASKED,
    )  # fmt: skip
    if ITERATIONS:
        correction += tl.sum(ds, 1)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION), correction


@_tuned("backward query")
@triton.jit(do_not_specialize=["SIZE", "HEADS"])
def _backward_query_kernel(
    Q, K, V, MASK, OUT, GO, DQ, ENTROPY, LSE, LARGEST, ARGMAX, GRAD_ENTROPY, DELTA, CORRECTION, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, mb, mh, mr, mc, HEADS, T, S, SIZE,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dQ; and of every row what the keys' gradients need too, which `_backward_key_kernel` reads."""
    blocks = tl.cdiv(T, ROWS)
    row = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    pair = tl.program_id(0) // blocks
    batch, head = pair // HEADS, pair % HEADS
    rows = row + tl.arange(0, ROWS)
    at = pair.to(tl.int64) * T + rows
    grad_entropy = tl.load(GRAD_ENTROPY + at, mask=rows < T, other=0.0)  # [ROWS]
    entropy = tl.load(ENTROPY + at, mask=rows < T, other=0.0)
    lse = tl.load(LSE + at, mask=rows < T, other=-MASK_VALUE)
    g = _read(_head(GO, batch, head, gb, gh), rows, T, gt, E, PADDED_E, not EVEN)  # [ROWS, PADDED_E]
    out = _read(
        _inner_head(OUT, batch, head, T, HEADS, E), rows.to(tl.int64), T, HEADS * E, E, PADDED_E, not EVEN
    )  # fmt: skip
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1) + grad_entropy * entropy
    tl.store(DELTA + at, delta, mask=rows < T)

    q = _read(_head(Q, batch, head, qb, qh), rows, T, qt, D, PADDED, not EVEN)  # [ROWS, PADDED]
    K, V = _head(K, batch, head, kb, kh), _head(V, batch, head, vb, vh)
    if MASK_KIND != 0:
        MASK = _head(MASK, batch, head, mb, mh)
    correction = tl.zeros((ROWS,), tl.float32)
    largest = correction
    if ITERATIONS:
        largest = tl.load(LARGEST + at, mask=rows < T, other=0.0)
    dq = tl.zeros((ROWS, PADDED), tl.float32)
    middle, end = _key_ranges(row, T, S, CAUSAL, MASK_KIND, ROWS, KEYS)
    for col in range(0, middle, KEYS):
        dq, correction = _backward_query_block(
            q, g, K, V, MASK, dq, correction, lse, delta, grad_entropy, largest,
            row, col, scale, kt, vt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP,
            SCALED, EVEN, ROWS, KEYS, False,
        )  # fmt: skip
    for col in range(middle, end, KEYS):
        dq, correction = _backward_query_block(
            q, g, K, V, MASK, dq, correction, lse, delta, grad_entropy, largest,
            row, col, scale, kt, vt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP,
            SCALED, EVEN, ROWS, KEYS, True,
        )  # fmt: skip

    if ITERATIONS:
        tl.store(CORRECTION + at, correction, mask=rows < T)
        argmax = tl.load(ARGMAX + at, mask=rows < T, other=0)
        dq -= correction[:, None] * _read(K, argmax, S, kt, D, PADDED, False).to(tl.float32)
    _write(_inner_head(DQ, batch, head, T, HEADS, D), rows, T, HEADS * D, dq * scale, D, PADDED)


@triton.jit
def _backward_key_block(
    k, v, Q, GO, MASK, dk, dv, LSE, DELTA, GRAD_ENTROPY, LARGEST, ARGMAX, CORRECTION,
    row, col, scale, qt, gt, mr, mc, T, S,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys down and queries across, so that p and dS need not be transposed for their products."""
    rows, keys = row + tl.arange(0, ROWS), col + tl.arange(0, KEYS)
    exists = rows < T
    unit, hidden = _units(scale, SCALED)
    q = _read(Q, rows, T, qt, D, PADDED, not EVEN)  # [ROWS, PADDED]
    g = _read(GO, rows, T, gt, E, PADDED_E, not EVEN)  # [ROWS, PADDED_E]
    lse = tl.load(LSE + rows, mask=exists, other=-MASK_VALUE)  # [ROWS]
    delta = tl.load(DELTA + rows, mask=exists, other=0.0)
    grad_entropy = tl.load(GRAD_ENTROPY + rows, mask=exists, other=0.0)
    largest = delta
    if ITERATIONS:
        largest = tl.load(LARGEST + rows, mask=exists, other=0.0)
    s, slope = _logits(
        q, k, rows[None, :], keys[:, None], MASK, scale, hidden, mr, mc, T, S,
        CAUSAL, MASK_KIND, MASKED, PRECISION, SOFTCAP, SCALED, EVEN, True,
    )  # fmt: skip
    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)  # [KEYS, ROWS]
    p, ds = _grad_logits(
        s, slope, dp, lse[None, :], delta[None, :], grad_entropy[None, :], largest[None, :], unit,
        ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP, MASKED,
    )  # fmt: skip
    if ITERATIONS:
        argmax = tl.load(ARGMAX + rows, mask=exists, other=-1)
        correction = tl.load(CORRECTION + rows, mask=exists, other=0.0)
        ds = tl.where(keys[:, None] == argmax[None, :], ds - correction[None, :], ds)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)  # [KEYS, PADDED_E]
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)  # [KEYS, PADDED]
    return dk, dv


@_tuned("backward key")
@triton.jit(do_not_specialize=["SIZE", "HEADS"])
def _backward_key_kernel(
    Q, K, V, MASK, GO, DK, DV, LSE, LARGEST, ARGMAX, GRAD_ENTROPY, DELTA, CORRECTION, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, mb, mh, mr, mc, HEADS, T, S, SIZE,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dK and dV, from what `_backward_query_kernel` has left of every row."""
    blocks = tl.cdiv(S, KEYS)
    col = tl.program_id(0) % blocks * KEYS
    pair = tl.program_id(0) // blocks
    batch, head = pair // HEADS, pair % HEADS
    keys = col + tl.arange(0, KEYS)
    k = _read(_head(K, batch, head, kb, kh), keys, S, kt, D, PADDED, not EVEN)  # [KEYS, PADDED]
    v = _read(_head(V, batch, head, vb, vh), keys, S, vt, E, PADDED_E, not EVEN)  # [KEYS, PADDED_E]
    Q, GO = _head(Q, batch, head, qb, qh), _head(GO, batch, head, gb, gh)
    if MASK_KIND != 0:
        MASK = _head(MASK, batch, head, mb, mh)
    at = pair.to(tl.int64) * T
    LSE, DELTA, GRAD_ENTROPY = LSE + at, DELTA + at, GRAD_ENTROPY + at
    if ITERATIONS:
        LARGEST, ARGMAX, CORRECTION = LARGEST + at, ARGMAX + at, CORRECTION + at
    dk = tl.zeros((KEYS, PADDED), tl.float32)
    dv = tl.zeros((KEYS, PADDED_E), tl.float32)

    # From the first row that sees any of these keys to the first block of rows that see all of them. Keys behind the
    # last one need not be hidden: nothing of them is written.
    begin, middle = 0, 0
    if CAUSAL:
        begin = tl.maximum(0, col - (S - T)) // ROWS * ROWS
        middle = tl.minimum(tl.cdiv(tl.maximum(0, col + KEYS - 1 - (S - T)), ROWS) * ROWS, tl.cdiv(T, ROWS) * ROWS)
    if MASK_KIND != 0:
        middle = tl.cdiv(T, ROWS) * ROWS
    for row in range(begin, middle, ROWS):
        dk, dv = _backward_key_block(
            k, v, Q, GO, MASK, dk, dv, LSE, DELTA, GRAD_ENTROPY, LARGEST, ARGMAX, CORRECTION,
            row, col, scale, qt, gt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP,
            SCALED, EVEN, ROWS, KEYS, True,
        )  # fmt: skip
    for row in range(middle, T, ROWS):
        dk, dv = _backward_key_block(
            k, v, Q, GO, MASK, dk, dv, LSE, DELTA, GRAD_ENTROPY, LARGEST, ARGMAX, CORRECTION,
            row, col, scale, qt, gt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP,
            SCALED, EVEN, ROWS, KEYS, False,
        )  # fmt: skip
    _write(_inner_head(DK, batch, head, S, HEADS, D), keys, S, HEADS * D, dk * scale, D, PADDED)
    _write(_inner_head(DV, batch, head, S, HEADS, E), keys, S, HEADS * E, dv, E, PADDED_E)


@functools.lru_cache(maxsize=4096)
def _constants(
    dtype: torch.dtype,
    widths: tuple[int, int],
    lengths: tuple[int, int],
    causal: bool,
    mask_kind: int,
    power: int,
    polynomial: int,
    softcap: float | None,
) -> tuple[dict[str, Any], int]:
    """The kernels' constants, and SIZE, by which tunings are told apart: orders of magnitude of T and S, in fours."""
    size = [min(6, max(2, (n - 1).bit_length() // 2)) for n in lengths]
    constants = {
        "D": widths[0],
        "PADDED": max(16, triton.next_power_of_2(widths[0])),
        "E": widths[1],
        "PADDED_E": max(16, triton.next_power_of_2(widths[1])),
        "CAUSAL": causal,
        "MASK_KIND": mask_kind,
        # float32 products are exact ones, not tf32: the entropy of sharp rows needs the digits.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "ITERATIONS": power,
        "LOWEST": -secure_softmax.CLIP * 2.0**power if power else 0.0,
        "POLYNOMIAL": polynomial,
        "SOFTCAP": float(softcap or 0.0),
        "SCALED": power > 0 or polynomial > 0 or softcap is not None or mask_kind == 2,
        "EVEN": all(n % LARGEST_BLOCK == 0 for n in lengths),
    }
    return constants, 8 * size[0] + size[1]


_CHOSEN: dict[tuple[Any, ...], Any] = {}


def _launch(name: str, kernel: Any, key: tuple[Any, ...], count: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel with its best tuning choice: `count` rows or keys, cut into blocks, times heads.

    Triton's tuner would ask itself on every call which choice it has found; that takes as long as the launch.
    """
    choice = _CHOSEN.get((name, key))
    if choice is None:
        wider = max(constants["PADDED"], constants["PADDED_E"])
        able = choices(name, wider, arguments[0].dtype == torch.float32)
        choice = _CHOSEN[name, key] = able[0] if len(able) == 1 else _tune(name, kernel, count, arguments, constants)
    block = choice.kwargs["KEYS" if name == "backward key" else "ROWS"]
    batch, heads = arguments[0].shape[:2]
    kernel.fn[(-(-count // block) * batch * heads,)](*arguments, **constants, **choice.all_kwargs(), **LAUNCH)


def _tune(name: str, kernel: Any, count: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    block = "KEYS" if name == "backward key" else "ROWS"
    batch, heads = arguments[0].shape[:2]
    kernel[lambda meta: (triton.cdiv(count, meta[block]) * batch * heads,)](*arguments, **constants, **LAUNCH)
    return kernel.best_config


def _mask_arguments(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, tuple[Any, ...], int]:
    """The mask as the kernels read it, its strides (0 where it is broadcast), and its kind."""
    if mask is None:
        return None, (None, None, None, None), 0
    kind = 1 if mask.dtype == torch.bool else 2
    mask = mask.to(torch.uint8) if kind == 1 else mask.float()
    mask = mask.expand(*query.shape[:3], key.shape[2])
    return mask, mask.stride(), kind


def _heads_inside(tensor: Tensor, width: int) -> Tensor:
    """An uninitialised `(B, H, T, width)` of the tensor's kind that lies in memory as (B, T, H, width)."""
    batch, heads, length = tensor.shape[:3]
    return tensor.new_empty(batch, length, heads, width).transpose(1, 2)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    seen: Tensor | None,
    causal: bool,
    power: int,
    polynomial: int,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output, entropy, L to base 2 (natural with iterations), and with iterations the largest logits and their keys."""
    query, key, value = contiguous_rows(query), contiguous_rows(key), contiguous_rows(value)
    heads, length, width = query.shape[1:]
    output = _heads_inside(query, value.shape[3])
    entropy, lse, largest, argmax = row_results(query, power)
    mask, mask_strides, mask_kind = _mask_arguments(mask, query, key)
    key_of_tuning = (query.dtype, (width, value.shape[3]), causal, mask_kind, power, polynomial, softcap)
    constants, size = _constants(
        query.dtype, (width, value.shape[3]), (length, key.shape[2]), causal, mask_kind, power, polynomial, softcap
    )
    _launch(
        "forward", _forward_kernel, (size, *key_of_tuning), length,
        query, key, value, mask, None if sinks is None else sinks.contiguous(), output, entropy, lse, largest, argmax,
        scale, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides,
        heads, length, key.shape[2], size, **constants, HAS_SINKS=sinks is not None,
    )  # fmt: skip
    return as_mean(output, lse * math.log(2.0), seen), entropy, lse, largest, argmax


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seen: Tensor | None,
    causal: bool,
    power: int,
    polynomial: int,
    softcap: float | None,
    scale: float,
    rows: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    grad_output: Tensor,
    grad_entropy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; `rows` is what `_forward` returned."""
    output, entropy, lse, largest, argmax = rows
    output, grad_output = before_mean(output, grad_output, lse * math.log(2.0), seen)
    query, key, value, grad_output = (contiguous_rows(x) for x in (query, key, value, grad_output))
    if not output.transpose(1, 2).is_contiguous():  # a compiler may have laid it out anew
        output = output.transpose(1, 2).contiguous().transpose(1, 2)
    heads, length, width = query.shape[1:]
    delta = torch.empty_like(entropy)
    correction = None if largest is None else torch.empty_like(largest)
    grad_query, grad_key = _heads_inside(query, width), _heads_inside(key, width)
    grad_value = _heads_inside(value, value.shape[3])
    mask, mask_strides, mask_kind = _mask_arguments(mask, query, key)
    key_of_tuning = (query.dtype, (width, value.shape[3]), causal, mask_kind, power, polynomial, softcap)
    constants, size = _constants(
        query.dtype, (width, value.shape[3]), (length, key.shape[2]), causal, mask_kind, power, polynomial, softcap
    )
    numbers = (
        scale, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_output.stride()[:3], *mask_strides,
        heads, length, key.shape[2], size,
    )  # fmt: skip
    _launch(
        "backward query", _backward_query_kernel, (size, *key_of_tuning), length,
        query, key, value, mask, output, grad_output, grad_query,
        entropy, lse, largest, argmax, grad_entropy, delta, correction, *numbers, **constants,
    )  # fmt: skip
    _launch(
        "backward key", _backward_key_kernel, (size, *key_of_tuning), key.shape[2],
        query, key, value, mask, grad_output, grad_key, grad_value,
        lse, largest, argmax, grad_entropy, delta, correction, *numbers, **constants,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


class _Direct(torch.autograd.Function):
    """The kernels without torch's dispatcher in between, whose Python layers take longer than a launch."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        query, key, value, mask, sinks, seen, *ctx.options = inputs
        ctx.save_for_backward(query, key, value, mask, sinks, seen, *output)
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_entropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        query, key, value, mask, sinks, seen, *rows = ctx.saved_tensors
        incoming = grad_output.to(query.dtype), grad_entropy.float().contiguous()
        causal, power, polynomial, softcap, scale = ctx.options
        grads = _backward(
            query, key, value, mask, seen, causal, power, polynomial, softcap, scale, tuple(rows), *incoming
        )  # fmt: skip
        grad_sinks = None
        if ctx.needs_input_grad[4]:
            grad_sinks = gradient_of_sinks(sinks, rows[2] * math.log(2.0), rows[0], rows[1], *incoming)
        return (*grads, None, grad_sinks, None, *(None for _ in ctx.options))


@torch.library.custom_op("entropi::attention_triton", mutates_args=())
def operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    seen: Tensor | None,
    causal: bool,
    power: int,
    polynomial: int,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `_forward` returns, tensors of no elements in the place of None."""
    return with_empty(*_forward(query, key, value, mask, sinks, seen, causal, power, polynomial, softcap, scale))


@torch.library.custom_op("entropi::attention_triton_backward", mutates_args=())
def operator_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    seen: Tensor | None,
    causal: bool,
    power: int,
    polynomial: int,
    softcap: float | None,
    scale: float,
    output: Tensor,
    entropy: Tensor,
    lse: Tensor,
    largest: Tensor,
    argmax: Tensor,
    grad_output: Tensor,
    grad_entropy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    extra = (largest, argmax) if power else (None, None)
    rows = (output, entropy, lse, *extra)
    options = (causal, power, polynomial, softcap, scale)
    return _backward(query, key, value, mask, seen, *options, rows, grad_output, grad_entropy)


make_differentiable(operator, operator_backward, unit=math.log(2.0), empty=_heads_inside)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    seen: Tensor | None,
    causal: bool,
    softmax: SoftmaxForm,
    softcap: float | None,
    scale: float,
) -> tuple[Any, ...]:
    """Output, entropy and what the backward needs.

    The operator is for who has to see it as one: compilers, tracers, fake and distributed tensors.
    """
    inputs = (query, key, value, mask, sinks, seen, causal, *squarings(softmax), softcap, scale)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return tuple(operator(*inputs))
    if not all(type(x) in (Tensor, torch.nn.Parameter) for x in (query, key, value)):
        return tuple(operator(*inputs))
    return tuple(_Direct.apply(*inputs))
