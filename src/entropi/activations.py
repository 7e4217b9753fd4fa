"""The names of activations, in one table for models, their files and private inference. Imports nothing.

What computes them stands in `model/feedforward.py` (PyTorch) and `private/compute/layers.py` (JAX, in secret).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Activation:
    """A nonlinear function between the two feed-forward matrices.

    Attributes:
        name: its name in code and files.
        words: its name in sentences.
        gated: it multiplies two halves of what the first matrix computes.
        folds_to: the activation that a folded model has in its place, where folding takes a part of it into matrices.
    """

    name: str
    words: str
    gated: bool = False
    folds_to: str | None = None


# By their part of an architecture's name. What an entry needs besides stands in docs/extending.md.
ACTIVATIONS: dict[str, Activation] = {
    "G": Activation("gelu", "GELU"),
    "R": Activation("relu", "ReLU"),
    "LeakyR": Activation("leaky_relu", "leaky ReLU", folds_to="relu"),
    "Square": Activation("square", "squared activations"),
    "Bilinear": Activation("bilinear", "bilinear feed-forward networks", gated=True),
    "SwiGLU": Activation("swiglu", "SwiGLU feed-forward networks", gated=True),
    "GeGLU": Activation("geglu", "GeGLU feed-forward networks", gated=True),
}


def known_activation(name: str) -> Activation | None:
    """The activation of this name in files; None for "identity" and for names that nobody knows."""
    return next((known for known in ACTIVATIONS.values() if known.name == name), None)


def folded_names() -> list[str]:
    """Names of the activations that a folded model may have."""
    return [known.name for known in ACTIVATIONS.values() if known.folds_to is None]


def folded_name(name: str) -> str:
    """The name of an activation in a folded model."""
    known = known_activation(name)
    return name if known is None or known.folds_to is None else known.folds_to
