"""What the compiled implementations of `entropy_attention` share: layouts, results of rows, torch operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from entropi.entropy.secure_softmax import mean_factors
from entropi.entropy.sinks import gradient as gradient_of_sinks
from entropi.softmax import SoftmaxForm

COMPILED_KINDS = frozenset({"exact", "power", "polynomial"})  # of softmax, which the compiled kernels compute


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, its last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def squarings(softmax: SoftmaxForm) -> tuple[int, int]:
    """A softmax of `COMPILED_KINDS` as operators take it: t of a power, or 0, and t of a polynomial, or 0."""
    t = softmax.iterations
    return (t if softmax.kind == "power" else 0), (t if softmax.kind == "polynomial" else 0)


def row_results(query: Tensor, power: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the kernels find of every row beside the output, uninitialised.

    `(B, H, T)` each: entropy, log-sum-exp and, where the softmax is a power, the largest logit and the first key
    that has it (None otherwise).
    """
    rows = query.shape[:3]
    entropy, lse = (query.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if not power:
        return entropy, lse, None, None
    return entropy, lse, query.new_empty(rows, dtype=torch.float32), query.new_empty(rows, dtype=torch.int32)


def with_empty(
    output: Tensor, entropy: Tensor, lse: Tensor, largest: Tensor | None, argmax: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An output and `row_results` as operators have to return them: no elements where there is nothing."""
    if largest is None or argmax is None:
        largest, argmax = lse.new_empty(0), lse.new_empty(0, dtype=torch.int32)
    return output, entropy, lse, largest, argmax


def as_mean(output: Tensor, lse: Tensor, keys: Tensor | None) -> Tensor:
    """The output of a softmax as that of the same weights over the number of `keys`, where one is given.

    `(B, H, T, E)`, with log-sum-exps in nats; as the output is in memory.
    """
    return output if keys is None else output.mul_(mean_factors(lse, keys)[..., None])


def before_mean(output: Tensor, grad_output: Tensor, lse: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the softmax's backward pass has to be given in the place of output and gradient, see `secure_softmax`."""
    if keys is None:
        return output, grad_output
    return torch.zeros_like(output), (grad_output * mean_factors(lse, keys)[..., None]).to(grad_output.dtype)


def empty_like(tensor: Tensor, width: int) -> Tensor:
    """An uninitialised, contiguous `(B, H, T, width)` of the tensor's kind."""
    return tensor.new_empty(*tensor.shape[:3], width)


def make_differentiable(
    forward: Any, backward: Any, unit: float = 1.0, empty: Callable[[Tensor, int], Tensor] = empty_like
) -> None:
    """Tell torch the shapes of an attention operator and its backward, and that the one differentiates the other.

    Both implementations have these two: forward(query, key, value, mask, sinks, keys, causal, power, polynomial,
    softcap, and what else it needs) -> output and `row_results`, with `squarings`, float32 sinks `(B, H, T)`, and the
    numbers of keys that broadcast against them where these are divided by; backward(those, those five, gradients of
    output and entropy) -> gradients of q, k, v. Log-sum-exps are in `unit` nats; `empty` makes tensors of the layout
    that output and gradients have.
    """

    @forward.register_fake
    def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return with_empty(empty(query, value.shape[3]), *row_results(query, rest[4]))

    @backward.register_fake
    def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return empty(query, query.shape[3]), empty(key, key.shape[3]), empty(value, value.shape[3])

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, key, value, mask, sinks, seen, *ctx.options = inputs
        ctx.save_for_backward(query, key, value, mask, sinks, seen, *output)
        ctx.mark_non_differentiable(*output[2:])

    def differentiate(ctx: Any, grad_output: Tensor, grad_entropy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, sinks, seen, *results = ctx.saved_tensors
        incoming = grad_output.to(query.dtype), grad_entropy.float().contiguous()
        grads = backward(query, key, value, mask, sinks, seen, *ctx.options, *results, *incoming)
        grad_sinks = None
        if ctx.needs_input_grad[4]:
            output, entropy, lse = results[:3]
            grad_sinks = gradient_of_sinks(sinks, lse * unit, output, entropy, *incoming)
        return (*grads, None, grad_sinks, None, *(None for _ in ctx.options))

    forward.register_autograd(differentiate, setup_context=save)
