"""Scaled dot-product attention that also returns the Shannon entropy of every row, differentiable.

Notation, per row: s = scaled, masked logits (temperature included); p = softmax(s); L = logsumexp(s);
H = -sum_j p_j log p_j = L - sum_j p_j s_j (Eq. 5-7 and 9-10 of the paper; their t is `temperature`, their
E^(l,h) the mean of our H over rows). All entropies are in nats. With `softcap` c logits are c tanh(s / c) before they
are masked; with `sinks` a row has one logit more than keys (`sinks.py`). With another form of the softmax the
log-weights l of `secure_softmax` take the place of s. Over a public number the output differs, not the entropy.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropi.entropy import native
from entropi.entropy import sinks as attention_sinks
from entropi.entropy.operators import COMPILED_KINDS, as_mean, before_mean
from entropi.entropy.secure_softmax import HIDDEN, log_weights, log_weights_backward, public_divisors
from entropi.softmax import EXACT, KINDS, SoftmaxForm, parse_of_attention

# Finite stand-in for -inf: exp() of it is 0 at every precision, and 0 * MASKED stays 0 where 0 * -inf is NaN.
MASKED = -1.0e30
SMALLEST_SCALE, LARGEST_SCALE = 1e-4, 1e4  # MASKED over either, and its products, are finite in float32
BLOCK_ROWS = 128  # query rows a block; large enough for efficient matmuls, small enough to stay in cache


def entropy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    temperature: Tensor | None = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    enable_gqa: bool = False,
    softmax: SoftmaxForm | str = EXACT,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention output and the entropy of every attention row.

    Args:
        query: `(B, H, T, D)`.
        key: `(B, H, S, D)`; with `enable_gqa`, `(B, G, S, D)` where G divides H.
        value: `(B, H, S, E)`, or `(B, G, S, E)`; values may be of another width than keys.
        is_causal: row i sees keys up to i + S - T: the last query row sees every key, as with a cache.
        scale: factor on the logits, 1/sqrt(D) by default.
        temperature: divides the logits of a row (Eq. 9); broadcasts against `(H, T)` or `(B, H, T)`.
            Receives gradients. Its values are not checked: a negative one turns the order of the keys around, 0 and
            NaN leave nothing of their rows that means anything, NaN for the most part.
        softcap: c > 0 bounds the scaled logits, s -> c tanh(s / c), before they are masked (Gemma 2).
        attn_mask: broadcasts against `(B, H, T, S)`; boolean (True = visible) or floats that are added. No gradients.
            What is added hides a key from -5e29 downwards, -inf included; anything above counts as a logit.
        sinks: `(H,)`, or what broadcasts against `(B, H, T)`: the logit of a key that every row sees and that has no
            value, as in gpt-oss (`s_aux`); neither scaled nor capped. It takes weight from the keys and counts in the
            entropy, which is that of the whole distribution, over the keys and the sink. -inf is no sink. Receives
            gradients.
        softmax: a `SoftmaxForm` or its text, "exact" by default; "power-t" is what private inference evaluates,
            "polynomial-t" does without comparisons, see `entropi.softmax`. Entropy is that of the weights so found. The
            exact one alone has `softcap` and `sinks`. "polynomial-t/keys" divides these weights by the number of keys
            that the row sees, masks counted, and not by their sum, "polynomial-t/128" by 128; the entropy is that of
            the weights over their sum.
        implementation: "reference" is the definition; "blockwise" never holds the T x S matrix and recomputes
            it in the backward pass, block by block; "native" does the same in a compiled CPU kernel, "triton" in a
            GPU kernel; "auto" takes the fastest that can run, see `available_implementations`. Matrix products are
            in the tensors' dtype; "native" takes in float32 what the processor has no instructions for.

    Under autocast the three are taken in its dtype, as `scaled_dot_product_attention` takes them; float64 stays.

    Returns:
        output `(B, H, T, E)` in the dtype they have, entropy `(B, H, T)` in nats, float32 (float64 for float64
        input). A row that sees no key has output 0 and entropy 0, with a sink too.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming them; no such `softmax`; `softcap` out of
            range, or with another softmax than the exact one; an implementation that cannot run, saying why.
    """
    _check_shapes(query, key, value, enable_gqa)
    query, key, value = _of_one_kind(query, key, value)
    softmax = parse_of_attention(softmax)
    _check_form(softmax, softcap, sinks)
    if attn_mask is not None:
        attn_mask = _four_dimensions(attn_mask, query, key)

    chosen = _implementation(implementation, query, softmax)
    query, scale = _scaled(query, scale, temperature, chosen)
    divisors = public_divisors(softmax, query, key.shape[2], attn_mask, is_causal)
    if sinks is not None:
        sinks = attention_sinks.per_row(sinks, query)

    shape = (*query.shape[:3], value.shape[3])
    if enable_gqa and key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        if query.shape[2] == 1 and (attn_mask is None or attn_mask.shape[1] == 1):
            # One token: the queries that share keys are rows of one head, and no key is read twice.
            query, is_causal = query.reshape(query.shape[0], key.shape[1], groups, -1), False
            sinks = None if sinks is None else sinks.reshape(query.shape[:3])
        else:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    options = (is_causal, softmax, softcap) if scale is None else (is_causal, softmax, softcap, scale)
    output, entropy, *_ = chosen.load()(query, key, value, attn_mask, sinks, divisors, *options)
    return (output, entropy) if output.shape == shape else (output.reshape(shape), entropy.reshape(shape[:3]))


class Implementation(NamedTuple):
    """One way to compute `entropy_attention`.

    `load()` gives the function: (query, key, value, mask, sinks, seen, is_causal, softmax, softcap), and after
    these the scale where it `scales` the logits itself, to output, entropy and whatever else; `seen` is what rows are
    divided by, such as numbers of keys, `(B, H, T)` or what broadcasts against it, or None. `unavailable_reason` says
    why it cannot run on tensors like the given one, or None; `computes` are the kinds of softmax that it knows.
    """

    name: str
    load: Callable[[], Callable[..., tuple[Any, ...]]]
    unavailable_reason: Callable[[Tensor], str | None]
    scales: bool = False
    computes: frozenset[str] = frozenset(KINDS)

    def reason_against(self, query: Tensor, softmax: SoftmaxForm) -> str | None:
        """Why it cannot compute this attention here, or None."""
        if softmax.kind not in self.computes:
            return f"it does not compute the softmax {softmax}"
        return self.unavailable_reason(query)


def _load_triton() -> Callable[..., tuple[Any, ...]]:
    from entropi.entropy import triton_kernel

    return triton_kernel.attention


def _no_native(query: Tensor) -> str | None:
    if query.dtype not in native.KINDS:
        return f"it computes in float32, the tensors are {query.dtype}"
    if query.device.type != "cpu":
        return f"it is for CPUs, the tensors are on {query.device.type}"
    return native.unavailable_reason()


def _no_triton(query: Tensor) -> str | None:
    if query.dtype not in native.KINDS:
        return f"it computes in float32, the tensors are {query.dtype}"
    return _no_triton_on(query.device.type)


@torch.compiler.assume_constant_result
def _no_triton_on(device: str) -> str | None:
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it is for CUDA devices, the tensors are on {device} (TRITON_INTERPRET=1 runs it anywhere, slowly)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


# The fastest first.
IMPLEMENTATIONS = (
    Implementation("triton", _load_triton, _no_triton, scales=True, computes=COMPILED_KINDS),
    Implementation("native", lambda: native.attention, _no_native, computes=COMPILED_KINDS),
    Implementation("blockwise", lambda: _Blockwise.apply, lambda query: None),
    Implementation("reference", lambda: _reference, lambda query: None),
)


def available_implementations(query: Tensor) -> dict[str, str | None]:
    """Every implementation and why it cannot run on tensors like `query`, or None where it can."""
    return {each.name: each.unavailable_reason(query) for each in IMPLEMENTATIONS}


def _implementation(name: str, query: Tensor, softmax: SoftmaxForm) -> Implementation:
    """The implementation of that name, or for "auto" the first that can run and is meant for the tensors' device."""
    for each in IMPLEMENTATIONS:
        if name == "auto":
            interpreted = each.name == "triton" and not query.is_cuda  # on a CPU, it is for those who ask for it
            if not interpreted and each.reason_against(query, softmax) is None:
                return each
        elif name == each.name:
            if (reason := each.reason_against(query, softmax)) is not None:
                raise ValueError(f"implementation {name!r} cannot run here: {reason}")
            return each
    names = ", ".join(each.name for each in IMPLEMENTATIONS)
    raise ValueError(f"implementation must be one of auto, {names}, got {name!r}")


def _scaled(
    query: Tensor, scale: float | None, temperature: Tensor | None, chosen: Implementation
) -> tuple[Tensor, float | None]:
    """Queries, and the scale that is left to the implementation, which saves a pass over them."""
    left = query.shape[-1] ** -0.5 if scale is None else scale
    scales = chosen.scales
    if not (scales and type(left) is float and SMALLEST_SCALE <= left <= LARGEST_SCALE):
        query, left = query * left, 1.0
    if temperature is not None:
        query = (query / temperature.unsqueeze(-1)).to(query.dtype)
    return query, left if scales else None


def _check_form(softmax: SoftmaxForm, softcap: float | None, sinks: Tensor | None) -> None:
    """Refuse a soft cap out of range, and what a form of the softmax cannot be had with."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or a positive number, got {softcap!r}")
    if not softmax.exact and (softcap is not None or sinks is not None):
        raise ValueError(f"softcap and sinks belong to the exact softmax, {softmax} replaces it: give one or the other")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    q, k, v = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if len(q) != 4 or len(k) != 4 or len(v) != 4 or k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3]:
        raise ValueError(f"query (B, H, T, D), key (B, H, S, D) and value (B, H, S, E) do not fit: {q}, {k}, {v}")
    if q[1] != k[1] and not (enable_gqa and q[1] % k[1] == 0):
        raise ValueError(f"{q[1]} query heads over {k[1]} key heads: enable_gqa needs a whole multiple")


def _of_one_kind(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype on one device: mixed dtypes would be read out of bounds."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"query, key and value are on different devices: {', '.join(str(t.device) for t in tensors)}")
    device = tensors[0].device.type
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)  # "meta" has none
    casts = known and torch.is_autocast_enabled(device)
    if casts and all(tensor.dtype != torch.float64 for tensor in tensors):
        tensors = tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"query, key and value have different dtypes: {', '.join(str(t.dtype) for t in tensors)}")
    return tensors


def _four_dimensions(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask with four dimensions. A wider one than the logits would silently be cut where blocks are."""
    logits = (*query.shape[:3], key.shape[2])
    fits = mask.dim() <= 4 and all(n in (1, m) for n, m in zip(reversed(mask.shape), reversed(logits)))
    if not fits:
        raise ValueError(f"attn_mask {tuple(mask.shape)} does not broadcast against (B, H, T, S) = {logits}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask must be boolean (True = visible) or floats that are added, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask is on {mask.device}, queries are on {query.device}")
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)


def _logits(query: Tensor, key: Tensor, softcap: float | None) -> Tensor:
    """Logits `(B, H, R, S)` before masks, at least float32."""
    logits = query @ key.transpose(-1, -2)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def _hide(logits: Tensor, mask: Tensor | None, is_causal: bool, first_row: int) -> Tensor:
    """Masked logits, of query rows `first_row`.. counted from the last key; may change those it is given."""
    if is_causal:
        # Every row sees the keys before `first_row`; only what follows can be masked.
        start = max(first_row, 0)
        rows = torch.arange(logits.shape[2], device=logits.device)[:, None] + first_row
        logits[..., start:].masked_fill_(torch.arange(start, logits.shape[3], device=logits.device) > rows, MASKED)
    if mask is not None:
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, MASKED)
        else:
            logits = (logits + mask).clamp(min=MASKED)
    return logits


def _with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """The rows' logits `(B, H, R, S)`, the sinks' `(B, H, R)` behind them."""
    return logits if sinks is None else torch.cat([logits, sinks.unsqueeze(-1)], dim=-1)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    seen: Tensor | None,
    is_causal: bool,
    softmax: SoftmaxForm,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The definition, materialised; autograd differentiates it."""
    logits = _hide(_logits(query, key, softcap), mask, is_causal, key.shape[2] - query.shape[2])
    logits = _with_sinks(logits, sinks)
    logits = log_weights(logits, softmax)
    visible = logits > HIDDEN
    probabilities = torch.softmax(logits, dim=-1) * visible
    log_probabilities = torch.log_softmax(logits, dim=-1).masked_fill(~visible, 0.0)
    entropy = -(probabilities * log_probabilities).sum(dim=-1)
    weights = probabilities[..., : key.shape[2]]
    if seen is not None:
        counted = visible.sum(dim=-1, keepdim=True).clamp(min=1)
        weights = logits.exp() * visible / (counted if softmax.divisor == "keys" else float(softmax.divisor))
    return weights.to(value.dtype) @ value, entropy


class _Blockwise(torch.autograd.Function):
    """Forward keeps L and H of every row; backward recomputes p and adds one elementwise term for the entropy.

    With g_O and g_H the incoming gradients: dS = p * (g_O V^T - rowsum(g_O * O) - g_H (log p + H)), because
    dH/ds_j = -p_j (log p_j + H). A softcap c multiplies it by its slope, 1 - (s / c)^2 of the capped logit s.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        seen: Tensor | None,
        is_causal: bool,
        softmax: SoftmaxForm,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        output = query.new_zeros(*query.shape[:3], value.shape[3])
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        entropy = torch.zeros(query.shape[:3], dtype=wide, device=query.device)
        # Rows that no block has see nothing but their sinks.
        lse = torch.zeros_like(entropy) if sinks is None else sinks.clone()
        with torch.autocast(query.device.type, enabled=False):
            for rows, keys, first_row in _blocks(query.shape[2], key.shape[2], is_causal):
                part = _mask_block(mask, rows, keys)
                logits = _hide(_logits(query[:, :, rows], key[:, :, keys], softcap), part, is_causal, first_row)
                logits = _with_sinks(logits, None if sinks is None else sinks[:, :, rows])
                logits = log_weights(logits, softmax)
                largest = logits.amax(dim=-1, keepdim=True)
                # softmax() passes quickly over masked entries, where exp() crawls through underflow.
                p = logits.softmax(dim=-1)
                log_total = -p.amax(dim=-1, keepdim=True).log()  # p is exp(s - largest) / total, 1 / total at most
                sees = largest > HIDDEN
                if part is not None:
                    p *= sees
                output[:, :, rows] = p[..., : keys.stop].to(value.dtype) @ value[:, :, keys]
                # Of shifted logits: the entropy must not cancel against logits of any size.
                mean_logit = p.mul_(logits.sub_(largest)).sum(dim=-1, keepdim=True)
                entropy[:, :, rows] = ((log_total - mean_logit) * sees).squeeze(-1).clamp(min=0.0)
                lse[:, :, rows] = (log_total + largest).squeeze(-1)
            output = as_mean(output, lse, seen)
        ctx.save_for_backward(query, key, value, mask, sinks, seen, output, entropy, lse)
        ctx.is_causal, ctx.softmax, ctx.softcap = is_causal, softmax, softcap
        return output, entropy

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, sinks, seen, output, entropy, lse = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        grad_sinks = None
        if ctx.needs_input_grad[4]:
            grad_sinks = attention_sinks.gradient(sinks, lse, output, entropy, grad_output, grad_entropy)
        with torch.autocast(query.device.type, enabled=False):
            output, grad_output = before_mean(output, grad_output, lse, seen)
            for rows, keys, first_row in _blocks(query.shape[2], key.shape[2], ctx.is_causal):
                part = _mask_block(mask, rows, keys)
                q, k, v, g = query[:, :, rows], key[:, :, keys], value[:, :, keys], grad_output[:, :, rows]
                logits = _logits(q, k, ctx.softcap)
                slope = None if ctx.softcap is None else 1.0 - (logits / ctx.softcap).square()
                logits = raw = _hide(logits, part, ctx.is_causal, first_row)
                logits = log_weights(raw, ctx.softmax)
                p = _with_sinks(logits, None if sinks is None else sinks[:, :, rows]).softmax(dim=-1)
                p = p[..., : keys.stop]
                log_p = logits.sub_(lse[:, :, rows, None])
                if part is not None:
                    p *= lse[:, :, rows, None] > HIDDEN
                grad_value[:, :, keys] += p.to(v.dtype).transpose(-1, -2) @ g
                delta = (g.to(p.dtype) * output[:, :, rows].to(p.dtype)).sum(dim=-1, keepdim=True)
                grad_h = grad_entropy[:, :, rows, None]
                inner = (g @ v.transpose(-1, -2)).to(p.dtype)
                inner -= delta + grad_h * entropy[:, :, rows, None]
                grad_s = inner.addcmul_(grad_h, log_p, value=-1.0).mul_(p)
                grad_s = log_weights_backward(grad_s, raw, ctx.softmax)
                if slope is not None:
                    grad_s *= slope
                grad_s = grad_s.to(q.dtype)
                grad_query[:, :, rows] = grad_s @ k
                grad_key[:, :, keys] += grad_s.transpose(-1, -2) @ q
        return grad_query, grad_key, grad_value, None, grad_sinks, None, None, None, None


def _blocks(queries: int, keys: int, is_causal: bool) -> list[tuple[slice, slice, int]]:
    """(query rows, keys any of them can see, position of the first row) for every block that sees something."""
    offset = keys - queries
    blocks = []
    for start in range(0, queries, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, queries)
        seen = min(keys, stop + offset) if is_causal else keys
        if seen > 0:
            # Rows before the first visible key are skipped here: they keep output 0 and entropy 0.
            first = max(start, -offset) if is_causal else start
            blocks.append((slice(first, stop), slice(0, seen), first + offset))
    return blocks


def _mask_block(mask: Tensor | None, rows: slice, keys: slice) -> Tensor | None:
    """The part of a broadcastable mask that belongs to a block."""
    if mask is None:
        return None
    if mask.dim() >= 2 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return mask[..., keys] if mask.shape[-1] > 1 else mask
