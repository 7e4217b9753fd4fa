"""The softmax that private inference evaluates, for models that are trained with what they will be run with.

An exponential under multi-party computation is t squarings: instead of exp(x) the secure engine computes
k(x) = (1 + max(x, -0.9 2^t) / 2^t)^(2^t) of x = s - max_j s_j, the largest over the keys a row sees, and divides by
the row's sum. Its relative error as an exponential is about x^2 / 2^(t+1). The clip keeps the base positive; what is
clipped weighs 0.1^(2^t), which is 0 in float32 from t = 6 on.

With l = log k(x) = 2^t log(1 + x / 2^t) the weights are p = softmax(l), so everything that attention derives from
logits holds with l in their place. Then, because k is not shift invariant, the gradient passes through the row's
maximum too: ds_j = g_j r_j - [j = argmax] sum_i g_i r_i, with g the gradient of l and r_j = 1 / (1 + x_j / 2^t), 0
where clipped. Of several largest logits the first one takes the second term: one subgradient of many.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = 0.9  # of 2^t, as in entropi.private.functions; a test compares the two
HIDDEN = -5.0e29  # logits up to here belong to keys that the row does not see
LARGEST_ITERATIONS = 16


def check_iterations(iterations: int | None) -> None:
    """Raises ValueError unless t is None or a whole number from 1 to 16."""
    if iterations is None:
        return
    if type(iterations) is not int or not 1 <= iterations <= LARGEST_ITERATIONS:
        raise ValueError(
            f"exp_iterations must be None (the exact softmax) or a whole number from 1 to {LARGEST_ITERATIONS}, "
            f"got {iterations!r}"
        )


def lowest(iterations: int) -> float:
    """Where x is clipped."""
    return -CLIP * 2.0**iterations


def log_weights(logits: Tensor, iterations: int) -> Tensor:
    """l of masked logits `(..., S)`, at least float32: 0 at the row's maximum, hidden keys as they were.

    log1p rather than the logarithm of the power: float32 then loses nothing for large t.
    """
    x = logits - logits.max(dim=-1, keepdim=True).values  # max, not amax: of equal ones the first has the gradient
    steps = 2.0**iterations
    log_k = torch.log1p(x.clamp(min=lowest(iterations)) / steps) * steps
    return torch.where(logits > HIDDEN, log_k, logits.detach())


def log_weights_backward(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    """ds of dl, of one shape `(..., S)`; dl is 0 at hidden keys."""
    largest, first = logits.max(dim=-1, keepdim=True)
    x = logits - largest
    rate = (1.0 + x / 2.0**iterations).reciprocal_().masked_fill_(x < lowest(iterations), 0.0)
    grad = grad * rate
    return grad.scatter_add_(-1, first, -grad.sum(dim=-1, keepdim=True))
