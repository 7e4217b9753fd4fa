"""The constants of GELU and SiLU in `private/compute/functions.py`: how they are found, and that they are these.

    python benchmarks/fit_activations.py

Both functions are relu(x) - g(|x|) with a g that falls to nothing. With u = max(end - a, 0) the secure engine computes
g(a) as A (u^2 + alpha u + beta)^2 + gamma u + delta, two squarings. Multiplied out that is any quartic in u, so the
smallest largest error is a linear programme; GELU is fitted to the exact and to the tanh form at once. The ends are
those with which the largest error is smallest, but for 0.5 % of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.special import erfc, expit

STEPS = 1200  # of the grid on which the error is bounded
BEYOND = 30.0  # how far beyond the end the constant that remains is held against g, which is nothing there


@dataclass(frozen=True)
class Fit:
    """A (u^2 + alpha u + beta)^2 + gamma u + delta with u = max(end - a, 0), and its largest error."""

    end: float
    alpha: float
    beta: float
    a: float
    gamma: float
    delta: float
    error: float


def gelu_falls(a: np.ndarray) -> list[np.ndarray]:
    """a P(N > a): relu less GELU at a >= 0, by the exact and by the tanh form."""
    tanh = 0.5 * (1 - np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    return [a * 0.5 * erfc(a / np.sqrt(2)), a * tanh]


def silu_falls(a: np.ndarray) -> list[np.ndarray]:
    """a / (1 + e^a): relu less SiLU at a >= 0."""
    return [a * expit(-a)]


def fit(falls, end: float) -> Fit:  # type: ignore[no-untyped-def]
    """The quartic in u whose largest distance from all of `falls` is smallest."""
    # Chebyshev points, as the error oscillates most at the ends.
    inside = end * (1 - np.cos(np.linspace(0, np.pi, STEPS))) / 2
    points = np.concatenate([inside, end + np.linspace(0, BEYOND, STEPS // 10)])
    u = np.maximum(end - points, 0.0) / end  # between 0 and 1, for the solver's sake
    powers = np.vander(u, 5, increasing=True)

    rows, bounds = [], []
    for values in falls(points):
        ones = np.ones((len(points), 1))
        rows += [np.hstack([powers, -ones]), np.hstack([-powers, -ones])]
        bounds += [values, -values]
    solved = linprog(
        [0, 0, 0, 0, 0, 1], A_ub=np.vstack(rows), b_ub=np.concatenate(bounds), bounds=[(None, None)] * 6, method="highs"
    )

    c0, c1, c2, c3, c4 = solved.x[:5] / end ** np.arange(5)
    alpha = c3 / (2 * c4)
    beta = (c2 / c4 - alpha**2) / 2
    return Fit(end, alpha, beta, c4, c1 - 2 * c4 * alpha * beta, c0 - c4 * beta**2, solved.x[5])


def best_end(falls, candidates: np.ndarray) -> Fit:  # type: ignore[no-untyped-def]
    """The fit whose end makes the largest error smallest."""
    return min((fit(falls, float(end)) for end in candidates), key=lambda found: found.error)


def main() -> None:
    """Print both fits, and what the program has."""
    from entropi.private.compute import functions

    for name, falls, end in (
        ("GELU", gelu_falls, functions._GELU_END),
        ("SiLU", silu_falls, functions._SILU_END),
    ):
        best = best_end(falls, np.linspace(0.9 * end, 1.1 * end, 41))
        print(f"{name}: the best end is {best.end:.3f}, with an error of {best.error:.5f}; refitted, and in use:")
        print(f"  {fit(falls, end)}")
        prefix = f"_{name.upper()}_"
        print(f"  { ({key: value for key, value in vars(functions).items() if key.startswith(prefix)}) }")


if __name__ == "__main__":
    main()
