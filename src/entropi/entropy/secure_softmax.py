"""The softmax that private inference evaluates, for models that are trained with what they will be run with.

**The secure exponential.** An exponential under multi-party computation is t squarings: instead of exp(x) the secure
engine computes k(x) = (1 + max(x, -0.9 2^t) / 2^t)^(2^t) of x = s - max_j s_j, the largest over the keys of a row, and
divides by the row's sum. Its relative error as an exponential is about x^2 / 2^(t+1). The clip keeps the base positive;
what is clipped weighs 0.1^(2^t), which is 0 in float32 from t = 6 on.

With l = log k(x) = 2^t log(1 + x / 2^t) the weights are p = softmax(l), so everything that attention derives from
logits holds with l in their place. Then, because k is not shift invariant, the gradient passes through the row's
maximum too: ds_j = g_j r_j - [j = argmax] sum_i g_i r_i, with g the gradient of l and r_j = 1 / (1 + x_j / 2^t), 0
where clipped. Of several largest logits the first one takes the second term: one subgradient of many.

**The polynomial.** Finding the largest logit and clipping are comparisons, which take most of the rounds of a private
softmax. The polynomial does without: k(s) = (1 + s / 2^t)^(2^t) of the logit itself, positive because the power is
even. It is e^s for small s and grows like s^(2^t) on both sides; a softmax temperature T makes it proportional to
(2^t T + s)^(2^t), an offset. With l = 2^t log |1 + s / 2^t| in the logits' place, ds_j = g_j / (1 + s_j / 2^t).

**Over the number of keys.** A private division is comparisons too. So the polynomial's weights k may be divided by n,
the number of keys that the row sees, which everyone knows: O = sum_j k_j v_j / n = f P V, with the softmax P of l, its
log-sum-exp L and f = e^L / n. The entropy stays that of P. As nothing divides by the row's sum, nothing flows through
it: with gradients g_O and g_H, dl_j = p_j (f g_O . v_j - g_H (log p_j + H)) and dv_j = sum_i f_i p_ij g_O,i. That is
the softmax's backward pass, given f g_O for the output's gradient and 0 for the output (`mean_factors`). A constant in
the place of n makes rows that see few keys no larger than others: f = e^L / N.

`entropi.softmax` names the forms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropi.softmax import SoftmaxForm

CLIP = 0.9  # of 2^t, as in entropi.private.compute.functions; a test compares the two
HIDDEN = -5.0e29  # logits up to here belong to keys that the row does not see
SMALLEST_BASE = 1e-9  # in float32 a base is 0 or larger; its logarithm has to be finite


def log_weights(logits: Tensor, softmax: SoftmaxForm) -> Tensor:
    """l of masked logits `(..., S)`, at least float32: of a power 0 at the row's maximum, hidden keys as they were.

    log1p rather than the logarithm of the power: float32 then loses nothing for large t.
    """
    if softmax.exact:
        return logits
    steps = 2.0**softmax.iterations
    if softmax.kind == "polynomial":
        log_k = _base(logits, softmax).abs().clamp(min=SMALLEST_BASE).log() * steps
        return torch.where(logits > HIDDEN, log_k, logits.detach())
    x = logits - logits.max(dim=-1, keepdim=True).values  # max, not amax: of equal ones the first has the gradient
    log_k = torch.log1p(x.clamp(min=_lowest(softmax)) / steps) * steps
    return torch.where(logits > HIDDEN, log_k, logits.detach())


def log_weights_backward(grad: Tensor, logits: Tensor, softmax: SoftmaxForm) -> Tensor:
    """ds of dl, of one shape `(..., S)`; dl is 0 at hidden keys."""
    if softmax.exact:
        return grad
    if softmax.kind == "polynomial":
        base = _base(logits, softmax)
        return grad / torch.where(base.abs() < SMALLEST_BASE, SMALLEST_BASE, base)
    largest, argmax = logits.max(dim=-1, keepdim=True)
    x = logits - largest
    rate = (1.0 + x / 2.0**softmax.iterations).reciprocal_().masked_fill_(x < _lowest(softmax), 0.0)
    grad = grad * rate
    return grad.scatter_add_(-1, argmax, -grad.sum(dim=-1, keepdim=True))


def mean_factors(lse: Tensor, keys: Tensor) -> Tensor:
    """f = e^L / n `(B, H, T)` of log-sum-exps in nats and divisors that broadcast; 0 for rows that see no key."""
    return torch.where(keys > 0, lse.exp() / keys, 0.0)


def public_divisors(
    softmax: SoftmaxForm, query: Tensor, keys: int, mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """What rows' weights are divided by if not by their sum, for `mean_factors`; arguments as of `numbers_of_keys`."""
    if not softmax.public_divisor:
        return None
    if softmax.divisor == "keys":
        return numbers_of_keys(query, keys, mask, is_causal)
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.full((1, 1, 1), float(softmax.divisor), dtype=wide, device=query.device)


def numbers_of_keys(query: Tensor, keys: int, mask: Tensor | None, is_causal: bool) -> Tensor:
    """How many of so many keys each row of `query` `(B, H, T, D)` sees, `(B or 1, H or 1, T or 1)`; at least float32.

    The mask is as `entropy_attention` takes it, with four dimensions. Where it has one row for all queries, no T x S
    matrix is made.
    """
    queries, wide = query.shape[2], torch.promote_types(query.dtype, torch.float32)
    ends = torch.arange(queries, device=query.device) + 1 + keys - queries  # of what each row sees of a causal model
    ends = ends.clamp(min=0) if is_causal else torch.full_like(ends, keys)
    if mask is None:
        return ends.to(wide)[None, None]
    visible = mask if mask.dtype == torch.bool else mask > HIDDEN
    visible = visible.expand(*visible.shape[:3], keys)
    if is_causal and visible.shape[2] == 1:
        first = torch.nn.functional.pad(visible[:, :, 0].cumsum(dim=-1), (1, 0))  # of the first 0, 1, .. S keys
        return first[:, :, ends].to(wide)
    if is_causal:
        visible = visible & (torch.arange(keys, device=query.device) < ends[:, None])
    return visible.sum(dim=-1).to(wide)


def _base(logits: Tensor, softmax: SoftmaxForm) -> Tensor:
    """1 + s / 2^t of the polynomial."""
    return 1.0 + logits / 2.0**softmax.iterations


def _lowest(softmax: SoftmaxForm) -> float:
    """Where a power clips the distance to the row's largest logit."""
    return -CLIP * 2.0**softmax.iterations
