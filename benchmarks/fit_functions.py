"""The constants in `private/compute/functions.py` of exp, GELU, SiLU and the inverse root: how they are found.

    python benchmarks/fit_functions.py

The first three are quartics A (u^2 + alpha u + beta)^2 + gamma u + delta of a clipped u, two squarings of the secure
engine; multiplied out that is any quartic in u.

- exp(x) for x <= 0 is the fourth power of a quartic in u = max(x / 4 + end, 0), so that the error of the fourth power
  is what has to be small: the base may be wrong by more where it is small. For a given error that is a linear
  programme, and bisection finds the smallest.
  The quartic is 0 at u = 0, for a row may have thousands of keys whose weights should vanish.
- GELU is relu(x) - g(|x|) with a g that falls to nothing, fitted in u = max(end - a, 0) to the exact and to the tanh
  form at once: the smallest largest error, of the end too.
- SiLU is relu(x) - h(|x|) with an h that falls slowly. A quartic is wrong by 0.0074 at best, and if it is so everywhere
  a pretrained model's answers suffer (SmolLM2: the likeliest token changes at 2.8 % of the positions). What a gate
  meets are mostly small numbers: half of them below 0.7, nine tenths below 2.3 (SmolLM2, weighted by the square of
  what is gated). So the squared error is made small under the density exp(-a / 1.5) with a floor, which leaves more to
  the tail (0.5 % of the positions, for the same bytes).

The inverse root y^-1/2 on an interval is the polynomial of least relative error, a linear programme, in factors: it has
one real zero, and its pairs of others make squares (y - c)^2 + g. Its scale is free.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.special import erfc, expit

STEPS = 1200  # of the grid on which the error is bounded
BEYOND = 30.0  # how far beyond the end the constant that remains is held against what is nothing there
TAIL = 0.003  # floor of SiLU's density, as a share of its largest value


@dataclass(frozen=True)
class Fit:
    """A (u^2 + alpha u + beta)^2 + gamma u + delta, u clipped at 0 beyond `end`, and its largest error."""

    end: float
    alpha: float
    beta: float
    a: float
    gamma: float
    delta: float
    error: float

    @classmethod
    def of(cls, end: float, coefficients: np.ndarray, error: float) -> Fit:
        """From the coefficients of (u / end)^0 to (u / end)^4."""
        c0, c1, c2, c3, c4 = coefficients / end ** np.arange(5)
        alpha = c3 / (2 * c4)
        beta = (c2 / c4 - alpha**2) / 2
        return cls(end, alpha, beta, c4, c1 - 2 * c4 * alpha * beta, c0 - c4 * beta**2, error)

    def __call__(self, u: np.ndarray) -> np.ndarray:
        return self.a * (u * u + self.alpha * u + self.beta) ** 2 + self.gamma * u + self.delta


def gelu_falls(a: np.ndarray) -> list[np.ndarray]:
    """a P(N > a): relu less GELU at a >= 0, by the exact and by the tanh form."""
    tanh = 0.5 * (1 - np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    return [a * 0.5 * erfc(a / np.sqrt(2)), a * tanh]


def silu_falls(a: np.ndarray) -> np.ndarray:
    """a / (1 + e^a): relu less SiLU at a >= 0."""
    return a * expit(-a)


def smallest_largest(points: np.ndarray, end: float, targets: list[np.ndarray]) -> np.ndarray:
    """Coefficients of the quartic in u / end, and last its largest distance from all of `targets`: the smallest."""
    powers = np.vander(np.maximum(end - points, 0.0) / end, 5, increasing=True)
    rows, bounds = [], []
    for values in targets:
        ones = np.ones((len(points), 1))
        rows += [np.hstack([powers, -ones]), np.hstack([-powers, -ones])]
        bounds += [values, -values]
    solved = linprog(
        [0, 0, 0, 0, 0, 1], A_ub=np.vstack(rows), b_ub=np.concatenate(bounds), bounds=[(None, None)] * 6, method="highs"
    )
    found: np.ndarray = solved.x
    return found


def chebyshev(end: float) -> np.ndarray:
    """Points between 0 and `end`, denser at both, where errors oscillate most."""
    return end * (1 - np.cos(np.linspace(0, np.pi, STEPS))) / 2


def fit_gelu(end: float) -> Fit:
    """The quartic whose largest distance from both forms is smallest."""
    points = np.concatenate([chebyshev(end), end + np.linspace(0, BEYOND, STEPS // 10)])
    *coefficients, error = smallest_largest(points, end, gelu_falls(points))
    return Fit.of(end, np.array(coefficients), error)


def fit_silu(end: float) -> Fit:
    """The quartic of least weighted squares."""
    points = np.linspace(0, BEYOND, 4 * STEPS)
    weights = np.sqrt(np.exp(-points / 1.5) + TAIL)
    powers = np.vander(np.maximum(end - points, 0.0) / end, 5, increasing=True)
    coefficients = np.linalg.lstsq(powers * weights[:, None], silu_falls(points) * weights, rcond=None)[0]
    fit = Fit.of(end, coefficients, 0.0)
    wrong = np.abs(fit(np.maximum(end - points, 0.0)) - silu_falls(points))
    return Fit(**{**vars(fit), "error": float(wrong.max())})


def weighted(fit: Fit) -> float:
    """Root of the mean square of SiLU's error under its density."""
    points = np.linspace(0, BEYOND, 4 * STEPS)
    wrong = fit(np.maximum(fit.end - points, 0.0)) - silu_falls(points)
    return float(np.sqrt(np.average(wrong**2, weights=np.exp(-points / 1.5) + TAIL)))


def fit_exp(end: float) -> Fit:
    """The quartic in u = max(end - a, 0) for exp(-a) whose fourth power is wrong by least, a = -x / 4."""
    a = chebyshev(end)
    powers = np.vander((end - a) / end, 5, increasing=True)
    low, high, coefficients = 0.0, 0.01, np.zeros(5)
    while high - low > 1e-7:
        error = (low + high) / 2
        most = (np.exp(-4.0 * a) + error) ** 0.25
        least = np.where(np.exp(-4.0 * a) > error, np.maximum(np.exp(-4.0 * a) - error, 0.0) ** 0.25, -most)
        solved = linprog(
            np.zeros(5),
            A_ub=np.vstack([powers, -powers]),
            b_ub=np.concatenate([most, -least]),
            bounds=[(0, 0), *[(None, None)] * 4],
            method="highs",
        )
        if solved.status == 0:
            high, coefficients = error, solved.x
        else:
            low = error
    fit = Fit.of(end, coefficients, 0.0)
    far = np.linspace(0, 4 * end, 20 * STEPS)
    wrong = np.abs(fit(np.maximum(end - far, 0.0)) ** 4 - np.exp(-4.0 * far))
    return Fit(**{**vars(fit), "error": float(wrong.max())})


@dataclass(frozen=True)
class RootFit:
    """`zero` - y times all (y - c)^2 + g, for y^-1/2 on [start, ratio * start], and its relative error."""

    start: float
    zero: float
    squares: tuple[tuple[float, float], ...]  # c and g, c rising
    error: float


def fit_root(ratio: float, degree: int) -> RootFit:
    """The polynomial of this odd degree, in the scale of y in which its leading coefficient is -1."""
    start = ratio**-0.5
    middle, half = start * (ratio + 1) / 2, start * (ratio - 1) / 2
    places = np.cos(np.linspace(0, np.pi, STEPS))
    powers = np.polynomial.chebyshev.chebvander(places, degree) * np.sqrt(middle + half * places)[:, None]
    ones = np.ones((STEPS, 1))
    solved = linprog(
        [*[0] * (degree + 1), 1],
        A_ub=np.vstack([np.hstack([powers, -ones]), np.hstack([-powers, -ones])]),
        b_ub=np.concatenate([np.ones(STEPS), -np.ones(STEPS)]),
        bounds=[(None, None)] * (degree + 2),
        method="highs",
    )
    polynomial = np.polynomial.Chebyshev(solved.x[:-1], [middle - half, middle + half]).convert(
        kind=np.polynomial.Polynomial
    )
    zeros = polynomial.roots()
    (zero,) = zeros[np.abs(zeros.imag) < 1e-6].real
    scale = float(-polynomial.coef[-1]) ** (1 / (degree + 0.5))  # y^-1/2 has a scale too
    pairs = sorted(scale * zeros[zeros.imag > 1e-6], key=lambda z: z.real)
    squares = tuple((float(z.real), float(z.imag) ** 2) for z in pairs)
    return RootFit(scale * start, float(scale * zero), squares, float(solved.x[-1]))


def main() -> None:
    """Print the fits, and what the program has."""
    from entropi.private.compute import functions

    for name, fit, end, worth in (
        ("EXP", fit_exp, functions._EXP_END, lambda found: found.error),
        ("GELU", fit_gelu, functions._GELU_END, lambda found: found.error),
        ("SILU", fit_silu, functions._SILU_END, weighted),
    ):
        best = min((fit(float(end)) for end in np.linspace(0.9 * end, 1.1 * end, 41)), key=worth)
        print(f"{name}: the best end is {best.end:.3f}, with an error of {best.error:.6f}; refitted, and in use:")
        print(f"  {fit(end)}")
        print(f"  { ({key: value for key, value in vars(functions).items() if key.startswith(f'_{name}_')}) }")
    for form in (functions._ROOT, functions._FEW_ROOT):
        print(f"ROOT, refitted, and in use:\n  {fit_root(form.ratio, 2 * len(form.squares) + 1)}\n  {form}")


if __name__ == "__main__":
    main()
