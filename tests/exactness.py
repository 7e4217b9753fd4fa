"""How exact an implementation of `entropy_attention` has to be, derived from the plain version's error."""

import torch

from entropi.entropy.attention import entropy_attention
from entropi.softmax import SoftmaxForm


def make(queries, keys, width, dtype=torch.float32, batch=2, heads=3, seed=0, value_width=None):
    """Query, key and value, and gradients of output and entropy."""
    generator = torch.Generator().manual_seed(seed)
    value_width = value_width or width
    sizes = [(batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, value_width)]
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in sizes]
    rows = (batch, heads, queries)
    return tensors, torch.randn(*rows, value_width, generator=generator), torch.randn(rows, generator=generator)


def squared(iterations):
    """Options for the exact softmax (None), the power of t squarings (t), the polynomial (-t), or a form's text."""
    if iterations is None:
        return {}
    if isinstance(iterations, str):
        return {"softmax": iterations}
    return {"softmax": SoftmaxForm("power" if iterations > 0 else "polynomial", abs(iterations))}


def everything(implementation, tensors, grad_output, grad_entropy, dtype, sinks=None, **options):
    """Output, entropy and the three gradients, or four where there are sinks."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors]
    if sinks is not None:
        inputs.append(sinks.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        options["sinks"] = inputs[3]
    output, entropy = entropy_attention(*inputs[:3], implementation=implementation, **options)
    incoming = [grad_output.to(output.dtype), grad_entropy.to(entropy.dtype)]
    return [output, entropy, *torch.autograd.grad([output, entropy], inputs, incoming)]


def assert_as_exact(implementation, tensors, grad_output, grad_entropy, dtype=torch.float32, slack=4e-6, **options):
    """Derived tolerance: at most twice the error of the plain version in the same precision.

    The slack is the float32 rounding of a dot product of some 256 terms, for cases where the plain version happens
    to be exact.
    """
    rest, slacks = (grad_output, grad_entropy), [slack] * 5
    exact = everything("reference", tensors, *rest, torch.float64, **options)
    plain = everything("reference", tensors, *rest, dtype, **options)
    got = everything(implementation, tensors, *rest, dtype, **options)
    if options.get("sinks") is not None:
        slacks.append(slack + _rounding_of_output(tensors, grad_output, exact[0], dtype, **options))
    for name, e, p, g, own in zip(("output", "entropy", "dq", "dk", "dv", "sinks"), exact, plain, got, slacks):
        assert torch.isfinite(g).all(), name
        scale = max(1.0, float(e.detach().abs().max()))
        error, allowed = (g.double() - e).abs().max(), 2 * (p.double() - e).abs().max() + own * scale
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


def _rounding_of_output(tensors, grad_output, output, dtype, sinks, **options):
    """What the gradient of sinks loses by the output being kept in `dtype`: p rowsum(|g_O| |O|) eps / 2 of a row.

    The plain version keeps the weights instead, whose errors cancel over the keys.
    """
    query, key, value = (x.double() for x in tensors)
    on_keys, _ = entropy_attention(
        query, key, torch.ones_like(value)[..., :1], sinks=sinks.double(), implementation="reference", **options
    )
    lost = ((1 - on_keys) * (grad_output * output.detach()).abs()).sum(-1) * torch.finfo(dtype).eps / 2
    return float(lost.sum_to_size(sinks.shape if sinks.dim() > 1 else (*sinks.shape, 1)).max())
