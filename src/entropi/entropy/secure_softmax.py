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

Below the public operation the two are told apart by the sign of `iterations`: t for the first, -t for the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = 0.9  # of 2^t, as in entropi.private.compute.functions; a test compares the two
HIDDEN = -5.0e29  # logits up to here belong to keys that the row does not see
LARGEST_ITERATIONS = 16
LARGEST_POLYNOMIAL = 8  # beyond, float32 would lose in 1 + s / 2^t what the power multiplies
SMALLEST_BASE = 1e-9  # in float32 a base is 0 or larger; its logarithm has to be finite


def signed_iterations(iterations: int | None, polynomial: bool) -> int | None:
    """None, t or -t. Raises ValueError unless t is None or a whole number from 1 to 16, for the polynomial 1 to 8."""
    if iterations is None and not polynomial:
        return None
    most = LARGEST_POLYNOMIAL if polynomial else LARGEST_ITERATIONS
    if type(iterations) is not int or not 1 <= iterations <= most:
        exact = "" if polynomial else "None (the exact softmax) or "
        of_what = " of a polynomial" if polynomial else ""
        raise ValueError(f"exp_iterations{of_what} must be {exact}a whole number from 1 to {most}, got {iterations!r}")
    return -iterations if polynomial else iterations


def lowest(iterations: int | None) -> float:
    """Where x is clipped; 0 where nothing is."""
    return 0.0 if iterations is None or iterations < 0 else -CLIP * 2.0**iterations


def log_weights(logits: Tensor, iterations: int) -> Tensor:
    """l of masked logits `(..., S)`, at least float32: 0 at the row's maximum, hidden keys as they were.

    log1p rather than the logarithm of the power: float32 then loses nothing for large t.
    """
    if iterations < 0:
        log_k = _base(logits, iterations).abs().clamp(min=SMALLEST_BASE).log() * 2.0**-iterations
        return torch.where(logits > HIDDEN, log_k, logits.detach())
    x = logits - logits.max(dim=-1, keepdim=True).values  # max, not amax: of equal ones the first has the gradient
    steps = 2.0**iterations
    log_k = torch.log1p(x.clamp(min=lowest(iterations)) / steps) * steps
    return torch.where(logits > HIDDEN, log_k, logits.detach())


def log_weights_backward(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    """ds of dl, of one shape `(..., S)`; dl is 0 at hidden keys."""
    if iterations < 0:
        base = _base(logits, iterations)
        return grad / torch.where(base.abs() < SMALLEST_BASE, SMALLEST_BASE, base)
    largest, first = logits.max(dim=-1, keepdim=True)
    x = logits - largest
    rate = (1.0 + x / 2.0**iterations).reciprocal_().masked_fill_(x < lowest(iterations), 0.0)
    grad = grad * rate
    return grad.scatter_add_(-1, first, -grad.sum(dim=-1, keepdim=True))


def _base(logits: Tensor, iterations: int) -> Tensor:
    """1 + s / 2^t of the polynomial."""
    return 1.0 + logits / 2.0**-iterations
