"""The GPU kernel of `entropy_attention`, in Triton: forward and backward fused, nothing of size T x S in memory.

Notation as in `attention.py`: s logits of scaled queries, p = exp(s - L), L log-normaliser, H entropy. Logarithms are
to base 2 inside, as the hardware's exponential is. Online over blocks of keys with m the largest logit so far:
z = sum e, w = sum e log2 e, e = 2^(s / ln 2 - m); a new maximum m + delta turns z into 2^-delta z and w into
2^-delta (w - delta z). In the end L = m + log2 z, H = ln 2 (log2 z - w / z), all in float32. The backward adds one
elementwise term: dS = p (dP - rowsum(g_O O) - g_H (log p + H)).

With ITERATIONS = t > 0 the exponential is k(x) = (1 + x / 2^t)^(2^t) of x = s - m, logarithms are natural (see
`secure_softmax`). It has no such rule for a new maximum: a first pass over the keys finds m. Then L = log sum k(x). The
backward pass of the queries finds what flows through the row's maximum and hands it to that of the keys.

There are two backward passes. One has a kernel for dQ and another for dK and dV, each with its own logits and dP: seven
products. The other adds to dQ from the kernel of the keys, atomically: five products, but 4 D bytes of traffic for each
query and block of keys, and sums in any order. Which is faster has to be measured (`ONE_PASS`).

With SOFTCAP = c > 0 logits are c tanh(s / c) before they are masked; the backward multiplies by 1 - tanh^2. A sink is a
logit that is seen first: m and z start with it, and nothing else of a row knows. Values are E wide, queries and keys D.

With POLYNOMIAL = t > 0 the logits become l = 2^t log |1 + s / 2^t| when they are computed, and everything else holds
for them; the backward divides by 1 + s / 2^t.

Blocks in which every row sees every key need no masking and are done in a loop of their own. Elsewhere hidden logits
are MASKED; m starts at half of that, so that they vanish as exponentials, and rows that see nothing have L = -MASKED,
so that their p is 0.

With TRITON_INTERPRET=1 the same code runs on the CPU, slowly; that is how it is tested without a GPU.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropi.entropy import secure_softmax
from entropi.entropy.native import contiguous_rows, make_differentiable, row_results

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NUMPY = tl.constexpr(INTERPRETED)  # the interpreter's products are numpy's
MASKED = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SMALLEST_BASE = tl.constexpr(secure_softmax.SMALLEST_BASE)


# Whether the kernel of the keys adds to dQ, where that is possible: not with ITERATIONS, when the keys need what the
# queries' pass finds, and not where torch was told to be deterministic. benchmarks/on_gpu.py times both.
ONE_PASS = False


# Tuning choices (ROWS, KEYS, warps, stages) by padded width, or for float32, whose exact products tensor cores do not
# compute. Chosen by what they compile to on sm_80 and sm_90, not by time: for the exact softmax at widths 64 and 128 in
# half precision none spills a register (benchmarks/compiled_kernels.py shows it, a test keeps it so).
CHOICES: dict[str, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    "forward": {
        "64": ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        "128": ((128, 64, 8, 3), (64, 32, 4, 2)),
        "256": ((64, 32, 8, 2), (32, 32, 4, 2)),
        "float32": ((32, 32, 8, 2), (32, 32, 4, 2)),
    },
    "backward query": {
        "64": ((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)),
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
    "backward both": {  # the kernel of the keys, adding to dQ
        "64": ((64, 64, 4, 3), (64, 128, 8, 2), (64, 64, 8, 2)),
        "128": ((32, 64, 8, 3), (32, 64, 8, 2)),
        "256": ((32, 64, 8, 2), (32, 32, 4, 2)),
        "float32": ((32, 32, 8, 2), (32, 16, 4, 1)),
    },
}


def choices(kernel: str, padded: int, float32: bool) -> list[Any]:
    """The tuning choices of a kernel for one width, the wider of the two, and precision."""
    kind = "float32" if float32 else "64" if padded <= 64 else "128" if padded == 128 else "256"
    return [triton.Config({"ROWS": r, "KEYS": k}, num_warps=w, num_stages=n) for r, k, w, n in CHOICES[kernel][kind]]


def _tuned(kernel: str, adds_to: tuple[str, ...] = ()) -> Any:
    """Tuning once per dtype, width, kind of attention and order of magnitude of T and S.

    What a kernel `adds_to` is set to zero before every run of the tuner.
    """
    key = ["SIZE", "PADDED", "PADDED_E", "CAUSAL", "MASK_KIND", "ITERATIONS", "POLYNOMIAL", "SOFTCAP"]
    if adds_to:
        key.append("ADDS_DQ")
    if INTERPRETED:  # nothing to tune; small blocks reach every branch on small tensors
        return triton.autotune([triton.Config({"ROWS": 32, "KEYS": 32})], key)

    def chosen(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
        name = "backward both" if constants.get("ADDS_DQ") else kernel
        wider = max(constants["PADDED"], constants["PADDED_E"])
        return choices(name, wider, arguments["Q"].dtype == torch.float32)

    # More than one configuration, or the tuner would not ask which ones are meant.
    prune = {"early_config_prune": chosen}
    return triton.autotune(choices(kernel, 64, False), key, prune_configs_by=prune, reset_to_zero=list(adds_to))


@triton.jit
def _head(base, batch, head, batch_stride, head_stride):
    """Where the (T, D) matrix of one head begins; 64 bits, because whole tensors may pass 2^31 elements."""
    return base + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


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
    return x


@triton.jit
def _write(base, rows, count, stride, x, D: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    where = base + rows[:, None] * stride + columns[None, :]
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
def _logits(
    q, k, t, j, MASK, mr, mc, T, S,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, HIDES: tl.constexpr, PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr, KEYS_DOWN: tl.constexpr = False,
):  # fmt: skip
    """Logits in float32, queries down and keys across or the other way round as t and j, their numbers, broadcast.

    And the softcap's slope, which means something if there is one.
    """
    if not KEYS_DOWN:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    elif NUMPY:
        # The same sums in the other order: logits would differ from the forward's by a rounding, which sharp rows show.
        s = tl.trans(tl.dot(q, tl.trans(k), input_precision=PRECISION))
    else:
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    slope = s
    if SOFTCAP > 0:
        y = _tanh(s * (1.0 / SOFTCAP))
        s = y * SOFTCAP
        slope = 1.0 - y * y
    if HIDES:
        seen = j < S
        if CAUSAL:
            seen = seen & (j <= t + (S - T))
        if MASK_KIND == 1:
            seen = seen & (t < T)
            visible = tl.load(MASK + t.to(tl.int64) * mr + j.to(tl.int64) * mc, mask=seen, other=0)
            seen = seen & (visible != 0)
        if MASK_KIND == 2:
            seen = seen & (t < T)
            s += tl.load(MASK + t.to(tl.int64) * mr + j.to(tl.int64) * mc, mask=seen, other=0.0)
            s = tl.where(s < MASKED, MASKED, s)
        s = tl.where(seen, s, MASKED)
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
    return tl.where(s <= MASKED / 2, s, log_k)


@triton.jit
def _forward_block(
    q, K, V, MASK, m, z, w, out, row, col, kt, vt, mr, mc, T, S,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """One block of keys into m, z, w and the unnormalised output; with ITERATIONS m is known and stays."""
    rows, keys = row + tl.arange(0, ROWS), col + tl.arange(0, KEYS)
    k = _read(K, keys, S, kt, D, PADDED, HIDES)
    s, _ = _logits(q, k, rows[:, None], keys[None, :], MASK, mr, mc, T, S, CAUSAL, MASK_KIND, HIDES, PRECISION, SOFTCAP)
    v = _read(V, keys, S, vt, E, PADDED_E, HIDES)
    if POLYNOMIAL:
        s = _polynomial_logits(s, POLYNOMIAL)
    if ITERATIONS:
        e, log_e = _power(s - m[:, None], ITERATIONS, LOWEST)
        if HIDES:  # clipped keys weigh something for small t, hidden ones never
            e = tl.where(s <= MASKED / 2, 0.0, e)
    else:
        largest = tl.maximum(m, tl.max(s, 1) * LOG2_E)
        delta = m - largest
        log_e = s * LOG2_E - largest[:, None]
        e = tl.exp2(log_e)
        factor = tl.exp2(delta)
        w = factor * (w + delta * z)
        z = factor * z
        out = out * factor[:, None]
        m = largest
    w += tl.sum(e * log_e, 1)
    z += tl.sum(e, 1)
    out = tl.dot(e.to(v.dtype), v, out, input_precision=PRECISION)
    return m, z, w, out


@triton.jit
def _largest_block(
    q, K, MASK, m, first, row, col, kt, mr, mc, T, S,
    D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """The row's largest logit and the first key that has it, over one more block of keys."""
    rows, keys = row + tl.arange(0, ROWS), col + tl.arange(0, KEYS)
    k = _read(K, keys, S, kt, D, PADDED, HIDES)
    s, _ = _logits(q, k, rows[:, None], keys[None, :], MASK, mr, mc, T, S, CAUSAL, MASK_KIND, HIDES, PRECISION, 0.0)
    largest, place = tl.max(s, 1, return_indices=True)
    first = tl.where(largest > m, col + place, first)
    return tl.maximum(m, largest), first


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
@triton.jit(do_not_specialize=["SIZE"])
def _forward_kernel(
    Q, K, V, MASK, SINKS, OUT, ENTROPY, LOG_NORMALISER, LARGEST, FIRST,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, mb, mh, mr, mc,
    HEADS, T, S, SIZE,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, ROWS)
    row = (blocks - 1 - tl.program_id(0) % blocks) * ROWS  # the longest rows of a causal head first
    pair = tl.program_id(0) // blocks
    batch, head = pair // HEADS, pair % HEADS
    rows = row + tl.arange(0, ROWS)
    q = _read(_head(Q, batch, head, qb, qh), rows, T, qt, D, PADDED, True)
    K, V, MASK = _head(K, batch, head, kb, kh), _head(V, batch, head, vb, vh), _head(MASK, batch, head, mb, mh)
    m = tl.full((ROWS,), MASKED / 2, tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    w = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, PADDED_E), tl.float32)
    middle, end = _key_ranges(row, T, S, CAUSAL, MASK_KIND, ROWS, KEYS)
    at = pair.to(tl.int64) * T + rows
    if HAS_SINKS:
        sink = tl.load(SINKS + at, mask=rows < T, other=MASKED) * LOG2_E
        m = tl.where(sink <= MASKED / 2, m, sink)
        z = tl.where(sink <= MASKED / 2, z, 1.0)
    if ITERATIONS:
        first = tl.zeros((ROWS,), tl.int32)
        for col in range(0, middle, KEYS):
            m, first = _largest_block(
                q, K, MASK, m, first, row, col, kt, mr, mc, T, S,
                D, PADDED, CAUSAL, MASK_KIND, PRECISION, ROWS, KEYS, False,
            )  # fmt: skip
        for col in range(middle, end, KEYS):
            m, first = _largest_block(
                q, K, MASK, m, first, row, col, kt, mr, mc, T, S,
                D, PADDED, CAUSAL, MASK_KIND, PRECISION, ROWS, KEYS, True,
            )  # fmt: skip
        tl.store(LARGEST + at, m, mask=rows < T)
        tl.store(FIRST + at, first, mask=rows < T)
    for col in range(0, middle, KEYS):
        m, z, w, out = _forward_block(
            q, K, V, MASK, m, z, w, out, row, col, kt, vt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP,
            ROWS, KEYS, False,
        )  # fmt: skip
    for col in range(middle, end, KEYS):
        m, z, w, out = _forward_block(
            q, K, V, MASK, m, z, w, out, row, col, kt, vt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP,
            ROWS, KEYS, True,
        )  # fmt: skip
    sees = z != 0  # true of what is not a number, which must not be hidden
    total = tl.where(sees, z, 1.0)
    log_total = tl.log2(total)
    if ITERATIONS:
        log_normaliser = LN_2 * log_total
        entropy = log_normaliser - w / total
    else:
        log_normaliser = m + log_total
        entropy = LN_2 * (log_total - w / total)
    entropy = tl.where(sees, tl.where(entropy < 0, 0.0, entropy), 0.0)
    tl.store(ENTROPY + at, entropy, mask=rows < T)
    tl.store(LOG_NORMALISER + at, tl.where(sees, log_normaliser, -MASKED), mask=rows < T)
    _write(_head(OUT, batch, head, ob, oh), rows, T, ot, out / total[:, None], E, PADDED_E)


@triton.jit
def _slopes(
    s, slope, dp, log_normaliser, row_sum, grad_entropy, largest,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """p and dS of a block, but for what flows through the row's maximum; `row_sum` is `_row_sum`'s."""
    if ITERATIONS:
        x = tl.where(s > largest, 0.0, s - largest)  # another order of summation may exceed the largest
        k, log_k = _power(x, ITERATIONS, LOWEST)
        p = k * tl.exp2(log_normaliser * -LOG2_E)
        if HIDES:
            p = tl.where(s <= MASKED / 2, 0.0, p)
        rate = tl.where(x < LOWEST, 0.0, 1.0 / (1.0 + x * (1.0 / 2**ITERATIONS)))
        ds = p * rate * (dp - row_sum - grad_entropy * (log_k - log_normaliser))
    else:
        log_p = s * LOG2_E - log_normaliser
        if POLYNOMIAL:
            log_p = _polynomial_logits(s, POLYNOMIAL) * LOG2_E - log_normaliser
        p = tl.exp2(log_p)
        ds = p * (dp - row_sum - (grad_entropy * LN_2) * log_p)
        if POLYNOMIAL:
            ds = ds / _polynomial_base(s, POLYNOMIAL)
        if SOFTCAP > 0:
            ds = ds * slope
    return p, ds


@triton.jit
def _row_sum(g, out, grad_entropy, entropy):
    """What every dP of a row is reduced by, rowsum(g_O O) + g_H H."""
    return tl.sum(g.to(tl.float32) * out.to(tl.float32), 1) + grad_entropy * entropy


@triton.jit
def _backward_query_block(
    q, g, K, V, MASK, dq, correction, log_normaliser, row_sum, grad_entropy, largest, row, col, kt, vt, mr, mc, T, S,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    rows, keys = row + tl.arange(0, ROWS), col + tl.arange(0, KEYS)
    k = _read(K, keys, S, kt, D, PADDED, HIDES)
    v = _read(V, keys, S, vt, E, PADDED_E, HIDES)
    s, slope = _logits(
        q, k, rows[:, None], keys[None, :], MASK, mr, mc, T, S, CAUSAL, MASK_KIND, HIDES, PRECISION, SOFTCAP
    )
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    _, ds = _slopes(
        s, slope, dp, log_normaliser[:, None], row_sum[:, None], grad_entropy[:, None], largest[:, None],
        ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP, HIDES,
    )  # fmt: skip
    if ITERATIONS:
        correction += tl.sum(ds, 1)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION), correction


@_tuned("backward query")
@triton.jit(do_not_specialize=["SIZE"])
def _backward_query_kernel(
    Q, K, V, MASK, OUT, GO, DQ, ENTROPY, LOG_NORMALISER, LARGEST, FIRST, GRAD_ENTROPY, ROW_SUM, CORRECTION,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, gb, gh, gt, db, dh, dt, mb, mh, mr, mc,
    HEADS, T, S, SIZE,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dQ; and of every row what the keys' gradients need too, which `_backward_key_kernel` reads."""
    blocks = tl.cdiv(T, ROWS)
    row = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    pair = tl.program_id(0) // blocks
    batch, head = pair // HEADS, pair % HEADS
    rows = row + tl.arange(0, ROWS)
    at = pair.to(tl.int64) * T + rows
    grad_entropy = tl.load(GRAD_ENTROPY + at, mask=rows < T, other=0.0)
    log_normaliser = tl.load(LOG_NORMALISER + at, mask=rows < T, other=-MASKED)
    g = _read(_head(GO, batch, head, gb, gh), rows, T, gt, E, PADDED_E, True)
    out = _read(_head(OUT, batch, head, ob, oh), rows, T, ot, E, PADDED_E, True)
    row_sum = _row_sum(g, out, grad_entropy, tl.load(ENTROPY + at, mask=rows < T, other=0.0))
    tl.store(ROW_SUM + at, row_sum, mask=rows < T)
    q = _read(_head(Q, batch, head, qb, qh), rows, T, qt, D, PADDED, True)
    K, V, MASK = _head(K, batch, head, kb, kh), _head(V, batch, head, vb, vh), _head(MASK, batch, head, mb, mh)
    correction = tl.zeros((ROWS,), tl.float32)
    largest = correction
    if ITERATIONS:
        largest = tl.load(LARGEST + at, mask=rows < T, other=0.0)
    dq = tl.zeros((ROWS, PADDED), tl.float32)
    middle, end = _key_ranges(row, T, S, CAUSAL, MASK_KIND, ROWS, KEYS)
    for col in range(0, middle, KEYS):
        dq, correction = _backward_query_block(
            q, g, K, V, MASK, dq, correction, log_normaliser, row_sum, grad_entropy, largest,
            row, col, kt, vt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP,
            ROWS, KEYS, False,
        )  # fmt: skip
    for col in range(middle, end, KEYS):
        dq, correction = _backward_query_block(
            q, g, K, V, MASK, dq, correction, log_normaliser, row_sum, grad_entropy, largest,
            row, col, kt, vt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP,
            ROWS, KEYS, True,
        )  # fmt: skip
    if ITERATIONS:
        tl.store(CORRECTION + at, correction, mask=rows < T)
        first = tl.load(FIRST + at, mask=rows < T, other=0)
        dq -= correction[:, None] * _read(K, first, S, kt, D, PADDED, False).to(tl.float32)
    _write(_head(DQ, batch, head, db, dh), rows, T, dt, dq, D, PADDED)


@triton.jit
def _backward_key_block(
    k, v, Q, GO, MASK, DQ, dk, dv, LOG_NORMALISER, ROW_SUM, GRAD_ENTROPY, LARGEST, FIRST, CORRECTION,
    row, col, qt, gt, mr, mc, T, S,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    ADDS_DQ: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Keys down and queries across, so that p and dS need not be transposed for their products."""
    rows, keys = row + tl.arange(0, ROWS), col + tl.arange(0, KEYS)
    exists = rows < T
    q = _read(Q, rows, T, qt, D, PADDED, True)
    g = _read(GO, rows, T, gt, E, PADDED_E, True)
    log_normaliser = tl.load(LOG_NORMALISER + rows, mask=exists, other=-MASKED)
    row_sum = tl.load(ROW_SUM + rows, mask=exists, other=0.0)
    grad_entropy = tl.load(GRAD_ENTROPY + rows, mask=exists, other=0.0)
    largest = row_sum
    if ITERATIONS:
        largest = tl.load(LARGEST + rows, mask=exists, other=0.0)
    s, slope = _logits(
        q, k, rows[None, :], keys[:, None], MASK, mr, mc, T, S, CAUSAL, MASK_KIND, HIDES, PRECISION, SOFTCAP, True
    )
    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    p, ds = _slopes(
        s, slope, dp, log_normaliser[None, :], row_sum[None, :], grad_entropy[None, :], largest[None, :],
        ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP, HIDES,
    )  # fmt: skip
    if ITERATIONS:
        first = tl.load(FIRST + rows, mask=exists, other=-1)
        correction = tl.load(CORRECTION + rows, mask=exists, other=0.0)
        ds = tl.where(keys[:, None] == first[None, :], ds - correction[None, :], ds)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if ADDS_DQ:
        ds = tl.where(keys[:, None] < S, ds, 0.0)  # behind the last key nothing was hidden, and p may be infinite
        dq = tl.dot(tl.trans(ds.to(k.dtype)), k, input_precision=PRECISION)
        columns = tl.arange(0, PADDED)
        where = DQ + rows[:, None] * D + columns[None, :]
        tl.atomic_add(where, dq, mask=exists[:, None] & (columns < D)[None, :], sem="relaxed")
    return dk, dv


@triton.jit
def _row_sum_kernel(
    OUT, GO, ENTROPY, GRAD_ENTROPY, ROW_SUM, ob, oh, ot, gb, gh, gt, HEADS, T,
    E: tl.constexpr, PADDED_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What `_backward_query_kernel` tells that of the keys, if only the latter runs."""
    blocks = tl.cdiv(T, ROWS)
    pair = tl.program_id(0) // blocks
    batch, head = pair // HEADS, pair % HEADS
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    g = _read(_head(GO, batch, head, gb, gh), rows, T, gt, E, PADDED_E, True)
    out = _read(_head(OUT, batch, head, ob, oh), rows, T, ot, E, PADDED_E, True)
    at = pair.to(tl.int64) * T + rows
    grad_entropy = tl.load(GRAD_ENTROPY + at, mask=rows < T, other=0.0)
    row_sum = _row_sum(g, out, grad_entropy, tl.load(ENTROPY + at, mask=rows < T, other=0.0))
    tl.store(ROW_SUM + at, row_sum, mask=rows < T)


@_tuned("backward key", adds_to=("DQ",))
@triton.jit(do_not_specialize=["SIZE"])
def _backward_key_kernel(
    Q, K, V, MASK, GO, DQ, DK, DV, LOG_NORMALISER, LARGEST, FIRST, GRAD_ENTROPY, ROW_SUM, CORRECTION,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, db, dh, dt, eb, eh, et, mb, mh, mr, mc,
    HEADS, T, S, SIZE,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_KIND: tl.constexpr, PRECISION: tl.constexpr,
    ITERATIONS: tl.constexpr, LOWEST: tl.constexpr, POLYNOMIAL: tl.constexpr, SOFTCAP: tl.constexpr,
    ADDS_DQ: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, KEYS)
    col = tl.program_id(0) % blocks * KEYS
    pair = tl.program_id(0) // blocks
    batch, head = pair // HEADS, pair % HEADS
    keys = col + tl.arange(0, KEYS)
    k = _read(_head(K, batch, head, kb, kh), keys, S, kt, D, PADDED, True)
    v = _read(_head(V, batch, head, vb, vh), keys, S, vt, E, PADDED_E, True)
    Q, GO, MASK = _head(Q, batch, head, qb, qh), _head(GO, batch, head, gb, gh), _head(MASK, batch, head, mb, mh)
    at = pair.to(tl.int64) * T
    LOG_NORMALISER, ROW_SUM, GRAD_ENTROPY = LOG_NORMALISER + at, ROW_SUM + at, GRAD_ENTROPY + at
    LARGEST, FIRST, CORRECTION, DQ = LARGEST + at, FIRST + at, CORRECTION + at, DQ + at * D
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
            k, v, Q, GO, MASK, DQ, dk, dv, LOG_NORMALISER, ROW_SUM, GRAD_ENTROPY, LARGEST, FIRST, CORRECTION,
            row, col, qt, gt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP, ADDS_DQ,
            ROWS, KEYS, True,
        )  # fmt: skip
    for row in range(middle, T, ROWS):
        dk, dv = _backward_key_block(
            k, v, Q, GO, MASK, DQ, dk, dv, LOG_NORMALISER, ROW_SUM, GRAD_ENTROPY, LARGEST, FIRST, CORRECTION,
            row, col, qt, gt, mr, mc, T, S,
            D, PADDED, E, PADDED_E, CAUSAL, MASK_KIND, PRECISION, ITERATIONS, LOWEST, POLYNOMIAL, SOFTCAP, ADDS_DQ,
            ROWS, KEYS, False,
        )  # fmt: skip
    _write(_head(DK, batch, head, db, dh), keys, S, dt, dk, D, PADDED)
    _write(_head(DV, batch, head, eb, eh), keys, S, et, dv, E, PADDED_E)


def _mask_arguments(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    """The mask as the kernels read it, its strides (0 where it is broadcast), and its kind."""
    if mask is None:
        return query, (0, 0, 0, 0), 0
    kind = 1 if mask.dtype == torch.bool else 2
    mask = mask.to(torch.uint8) if kind == 1 else mask.float()
    mask = mask.expand(*query.shape[:3], key.shape[2])
    return mask, mask.stride(), kind


def _shape_arguments(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """HEADS, T, S and SIZE, by which tunings are told apart: the orders of magnitude of T and S, in fours."""
    length, keys = query.shape[2], key.shape[2]
    size = [min(6, max(2, (n - 1).bit_length() // 2)) for n in (length, keys)]
    return query.shape[1], length, keys, 8 * size[0] + size[1]


def _constants(
    query: Tensor, value: Tensor, causal: bool, mask_kind: int, exp_iterations: int | None, softcap: float | None
) -> dict[str, Any]:
    width, value_width = query.shape[3], value.shape[3]
    return {
        "D": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "E": value_width,
        "PADDED_E": max(16, triton.next_power_of_2(value_width)),
        "CAUSAL": causal,
        "MASK_KIND": mask_kind,
        # float32 products are exact ones, not tf32: the entropy of sharp rows needs the digits.
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "ITERATIONS": max(exp_iterations or 0, 0),
        "LOWEST": secure_softmax.lowest(exp_iterations),
        "POLYNOMIAL": max(-(exp_iterations or 0), 0),
        "SOFTCAP": float(softcap or 0.0),
    }


@torch.library.custom_op("entropi::attention_triton", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    exp_iterations: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output `(B, H, T, E)` and `row_results` of scaled queries; without iterations L is to base 2."""
    query, key, value = contiguous_rows(query), contiguous_rows(key), contiguous_rows(value)
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, heads, length, value.shape[3])
    rows = row_results(query, exp_iterations)
    mask_data, mask_strides, mask_kind = _mask_arguments(mask, query, key)
    strides = [s for x in (query, key, value, output) for s in x.stride()[:3]]
    _forward_kernel[lambda meta: (triton.cdiv(length, meta["ROWS"]) * batch * heads,)](
        query, key, value, mask_data, rows[0] if sinks is None else sinks.contiguous(), output, *rows,
        *strides, *mask_strides, *_shape_arguments(query, key),
        **_constants(query, value, causal, mask_kind, exp_iterations, softcap), HAS_SINKS=sinks is not None,
    )  # fmt: skip
    return output, *rows


@torch.library.custom_op("entropi::attention_triton_backward", mutates_args=())
def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    exp_iterations: int | None,
    softcap: float | None,
    output: Tensor,
    entropy: Tensor,
    log_normaliser: Tensor,
    largest: Tensor,
    first: Tensor,
    grad_output: Tensor,
    grad_entropy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    query, key, value, grad_output = (contiguous_rows(x) for x in (query, key, value, grad_output))
    batch, heads, length, _ = query.shape
    row_sum, correction = torch.empty_like(entropy), torch.empty_like(largest)
    mask_data, mask_strides, mask_kind = _mask_arguments(mask, query, key)
    inputs = [s for x in (query, key, value) for s in x.stride()[:3]]
    rest = (*mask_strides, *_shape_arguments(query, key))
    constants = _constants(query, value, causal, mask_kind, exp_iterations, softcap)
    one_pass = ONE_PASS and not constants["ITERATIONS"] and not torch.are_deterministic_algorithms_enabled()
    if one_pass:
        grad_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        _row_sum_kernel[(triton.cdiv(length, 64) * batch * heads,)](
            output, grad_output, entropy, grad_entropy, row_sum,
            *output.stride()[:3], *grad_output.stride()[:3], heads, length,
            E=constants["E"], PADDED_E=constants["PADDED_E"], ROWS=64,
        )  # fmt: skip
    else:
        grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        _backward_query_kernel[lambda meta: (triton.cdiv(length, meta["ROWS"]) * batch * heads,)](
            query, key, value, mask_data, output, grad_output, grad_query,
            entropy, log_normaliser, largest, first, grad_entropy, row_sum, correction,
            *inputs, *(s for x in (output, grad_output, grad_query) for s in x.stride()[:3]), *rest, **constants,
        )  # fmt: skip
    grad_key, grad_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
    added_to = grad_query if one_pass else row_sum.new_empty(0)  # the tuner sets it to zero
    _backward_key_kernel[lambda meta: (triton.cdiv(key.shape[2], meta["KEYS"]) * batch * heads,)](
        query, key, value, mask_data, grad_output, added_to, grad_key, grad_value,
        log_normaliser, largest, first, grad_entropy, row_sum, correction,
        *inputs, *(s for x in (grad_output, grad_key, grad_value) for s in x.stride()[:3]), *rest,
        ADDS_DQ=one_pass, **constants,
    )  # fmt: skip
    return grad_query.to(query.dtype), grad_key, grad_value


make_differentiable(attention, attention_backward, unit=math.log(2.0))
