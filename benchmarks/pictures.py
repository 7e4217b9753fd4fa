"""The ten pictures of docs/private-inference.md as SVG, drawn anew; figures in them are computed, not typed.

python benchmarks/pictures.py                  # docs/pictures/*.svg
python benchmarks/pictures.py --out FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from entropi import EntropiConfig, cost

ROOT = Path(__file__).parent.parent
CLIENT, SERVER, SHARED, GREY = (
    ("#1f5fa8", "#e7f0fa"),
    ("#a8501a", "#fcefe3"),
    ("#6440b8", "#f0ebfb"),
    ("#555", "#f2f2f2"),
)
FRACTION_BITS = 18
Colour = tuple[str, str]


class Picture:
    """A drawing of boxes, arrows and text, in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, text: str, colour: Colour = GREY) -> None:
        """A box with centred lines of text; the first one is bold where there are several."""
        line, fill = colour
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="{line}"/>'
        )
        lines = text.split("\n")
        for number, words in enumerate(lines):
            top = y + height / 2 + 18 * (number - (len(lines) - 1) / 2) + 4.5
            self.text(x + width / 2, top, words, bold=number == 0 and len(lines) > 1, anchor="middle", colour=line)

    def text(
        self, x: float, y: float, words: str, *, bold: bool = False, anchor: str = "start", colour: str = "#222"
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(words)}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, words: str = "", colour: str = "#555") -> None:
        """An arrow with words above its middle."""
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.6" '
            'marker-end="url(#head)"/>'
        )
        if words:
            self.text((x1 + x2) / 2, (y1 + y2) / 2 - 7, words, anchor="middle", colour=colour)

    def line(self, points: list[tuple[float, float]], colour: str, dashed: bool = False) -> None:
        place = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<polyline points="{place}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')

    def svg(self) -> str:
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs>'
        )
        ground = f'<rect width="{self.width}" height="{self.height}" rx="10" fill="#fff"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="sans-serif" font-size="14">\n'
            f"<title>{escape(self.title)}</title>\n{head}\n{ground}\n" + "\n".join(self.parts) + "\n</svg>\n"
        )


def parties() -> Picture:
    p = Picture(820, 250, "Two parties: the client owns the prompt, the server owns the weights")
    p.box(30, 40, 230, 110, "Client\nowns the prompt\nreads the answer\nneeds no PyTorch", CLIENT)
    p.box(560, 40, 230, 110, "Server\nowns the weights\nanswers what it cannot read", SERVER)
    p.box(310, 40, 200, 110, "Two-party protocol\nrandom-looking numbers\nin both directions", SHARED)
    p.arrow(262, 80, 306, 80)
    p.arrow(306, 110, 262, 110)
    p.arrow(514, 80, 556, 80)
    p.arrow(556, 110, 514, 110)
    p.text(30, 185, "learns: logits or tokens, architecture, tokenizer", colour=CLIENT[0])
    p.text(30, 207, "does not learn: the weights", colour=CLIENT[0])
    p.text(790, 185, "learns: how many tokens, and when", anchor="end", colour=SERVER[0])
    p.text(790, 207, "does not learn: prompt, answer", anchor="end", colour=SERVER[0])
    return p


def shares() -> Picture:
    """A value and its two shares, with numbers from a fixed seed."""
    p = Picture(820, 270, "A value as two shares")
    value = round(0.75 * 2**FRACTION_BITS)
    first = int(np.random.default_rng(1).integers(0, 2**63)) * 2 + 1
    second = (value - first) % 2**64
    assert (first + second) % 2**64 == value
    p.box(290, 25, 240, 50, f"x = 0.75\nheld as {value:,}", SHARED)
    p.arrow(350, 78, 220, 118)
    p.arrow(470, 78, 600, 118)
    p.box(30, 122, 350, 55, f"client's share, random\n{first:,}", CLIENT)
    p.box(440, 122, 350, 55, f"server's share, x minus the other\n{second:,}", SERVER)
    p.text(
        410, 212, "Their sum modulo 2^64 is x. Either one alone is evenly distributed, whatever x is.", anchor="middle"
    )
    p.text(
        410, 238, "Sums, and products with public numbers, are computed on shares without a message.", anchor="middle"
    )
    return p


def fixed_point() -> Picture:
    p = Picture(820, 250, "Fixed-point numbers in a ring of 64 bits")
    left, width, bits = 40, 740, 64
    whole = width * (bits - 2 * FRACTION_BITS) / bits
    fraction = width * FRACTION_BITS / bits
    p.box(left, 50, whole, 46, "whole part and sign\n28 bits to spare", GREY)
    p.box(left + whole, 50, fraction, 46, "room of a product\n18 bits", SHARED)
    p.box(left + whole + fraction, 50, fraction, 46, "fraction\n18 bits", CLIENT)
    p.text(left, 36, "64 bits; x is held as round(x * 2^18)", bold=True)
    p.text(left, 135, f"smallest step: 2^-18 = {2.0**-18:.1e}. Smaller values get lost (underflow).")
    p.text(left, 160, "A product has 36 fraction bits until it is truncated, so it must stay below 2^27.")
    p.text(
        left,
        185,
        "Beyond, the number wraps around, and nothing tells: the server checks its model's ranges beforehand.",
    )
    p.text(left, 210, "Truncation is wrong by at most one last place, up or down at random.")
    return p


def linear() -> Picture:
    p = Picture(820, 330, "A private matrix times a private vector by homomorphic encryption")
    p.box(30, 30, 330, 44, "Client holds its share x1, and a key", CLIENT)
    p.box(460, 30, 330, 44, "Server holds its share x2, and the matrix W", SERVER)
    p.box(30, 100, 330, 40, "encrypts x1", CLIENT)
    p.arrow(364, 120, 456, 120, "Enc(x1)")
    p.box(460, 100, 330, 60, "computes on ciphertexts\nEnc(x1 W - r), r random", SERVER)
    p.arrow(456, 200, 364, 200, "Enc(x1 W - r)")
    p.box(30, 180, 330, 44, "decrypts: y1 = x1 W - r", CLIENT)
    p.box(460, 190, 330, 44, "y2 = x2 W + r", SERVER)
    p.text(
        410,
        265,
        "y1 + y2 = x W: the result is shared again. The server saw ciphertexts, the client random numbers.",
        anchor="middle",
    )
    p.text(
        410,
        290,
        "A ciphertext holds 8,192 numbers, so rows are packed together and bytes come in steps.",
        anchor="middle",
    )
    p.text(410, 315, "A product of two values that neither party knows takes this in both directions.", anchor="middle")
    return p


def comparison() -> Picture:
    p = Picture(820, 300, "A comparison by oblivious transfer")
    p.text(
        40, 32, "Is x > 0? The sign is the highest bit of a sum of two shares, so a carry has to be found.", bold=True
    )
    for number in range(8):
        x = 40 + number * 92
        p.box(x, 55, 84, 34, f"piece {number + 1}", GREY)
    for number in range(4):
        p.box(40 + number * 184, 115, 176, 34, "larger? equal?", SHARED)
    for number in range(2):
        p.box(40 + number * 368, 172, 360, 34, "larger? equal?", SHARED)
    p.box(40, 230, 728, 34, "one bit, shared: the comparison", SHARED)
    p.text(
        40,
        288,
        "By oblivious transfer the receiver gets the table's entry for its own piece; the sender does not learn which.",
    )
    return p


def softmax() -> Picture:
    """The steps of a private softmax beside the kernel that stands for exp."""
    p = Picture(820, 400, "Softmax in private, and the kernel that replaces the exponential")
    steps = (
        ("row maximum", "one comparison a number"),
        ("clip at -0.9 * 2^t", "one comparison a number"),
        ("1 + x / 2^t", "free"),
        ("square it t times", "t products a number"),
        ("sum, reciprocal", "one a row"),
        ("multiply", "one product a number"),
    )
    for number, (name, price) in enumerate(steps):
        y = 30 + number * 58
        p.box(30, y, 190, 40, name, SHARED)
        p.text(232, y + 25, price, colour="#555")
        if number:
            p.arrow(125, y - 17, 125, y - 2)
    left, top, width, height = 460, 40, 330, 290

    def place(x: float, value: float) -> tuple[float, float]:
        return left + (x + 8) / 8 * width, top + (1 - value) * height

    p.line([(left, top), (left, top + height), (left + width, top + height)], "#888")
    for t, colour in ((1, "#d19a2e"), (3, SERVER[0]), (8, CLIENT[0])):
        grid = np.linspace(-8, 0, 161)
        values = (np.maximum(1 + grid * 2.0**-t, 0.1)) ** 2**t
        p.line([place(x, v) for x, v in zip(grid, values)], colour)
        p.text(left + 20, top + 20 + 22 * {1: 1, 3: 2, 8: 3}[t], f"t = {t}", bold=True, colour=colour)
    p.line([place(x, float(np.exp(x))) for x in np.linspace(-8, 0, 161)], "#222", dashed=True)
    p.text(left + 20, top + 20, "dashed: exp(x)", colour="#222")
    p.text(left, top + height + 20, "-8")
    p.text(left + width, top + height + 20, "x = 0", anchor="end")
    p.text(left + width / 2, top + height + 42, "(1 + max(x, -0.9 2^t) / 2^t)^(2^t)", anchor="middle")
    return p


def block() -> Picture:
    p = Picture(820, 330, "One block as stages, and who knows what")
    rows = (
        ("state", SHARED, "qkv", SERVER, "q, k, v", SHARED),
        ("q, k", SHARED, "scores", GREY, "scores", SHARED),
        ("scores", SHARED, "max, exp", GREY, "weights", SHARED),
        ("weights, v", SHARED, "values, normalise", GREY, "heads", SHARED),
        ("heads", SHARED, "output", SERVER, "state", SHARED),
    )
    for number, (read, one, stage, two, written, three) in enumerate(rows):
        y = 50 + number * 48
        p.box(40, y, 170, 36, read, one)
        p.arrow(214, y + 18, 300, y + 18)
        p.box(305, y, 210, 36, stage, two)
        p.arrow(519, y + 18, 606, y + 18)
        p.box(610, y, 170, 36, written, three)
    p.text(125, 34, "reads", anchor="middle", bold=True)
    p.text(410, 34, "stage", anchor="middle", bold=True)
    p.text(695, 34, "writes", anchor="middle", bold=True)
    p.text(
        410,
        312,
        "Every value is shared. Orange stages multiply with the server's matrices, grey ones two shared values.",
        anchor="middle",
    )
    return p


def folding() -> Picture:
    p = Picture(820, 300, "What folding removes")
    before = (
        "norm's gain, bias",
        "Q, K, V",
        "temperature, 1/sqrt(d)",
        "softmax",
        "output",
        "FFN: up, down",
        "alpha, beta",
    )
    kept = {"Q, K, V", "softmax", "output"}
    p.text(40, 32, "SM(t)+WNorm(QKV+FFN)+ScFFN as trained", bold=True)
    p.text(520, 32, "as served", bold=True)
    for number, name in enumerate(before):
        p.box(40, 45 + number * 34, 240, 28, name, SHARED if name == "softmax" else SERVER if name in kept else GREY)
    for number, name in enumerate(("Q, K, V", "softmax", "output")):
        y = 79 + number * 62
        p.box(520, y, 240, 34, name, SHARED if name == "softmax" else SERVER)
    p.text(300, 64, "into the matrices", colour="#555")
    p.text(300, 132, "into Q", colour="#555")
    p.text(300, 234, "another basis of the", colour="#555")
    p.text(300, 252, "residual stream", colour="#555")
    p.text(520, 290, "Nothing is approximated: the logits are the same.", colour="#222")
    return p


def session() -> Picture:
    p = Picture(820, 430, "A session in time")
    p.box(40, 20, 160, 34, "client", CLIENT)
    p.box(620, 20, 160, 34, "server", SERVER)
    p.line([(120, 58), (120, 415)], "#bbb", dashed=True)
    p.line([(700, 58), (700, 415)], "#bbb", dashed=True)
    steps = (
        (True, "TLS 1.3, certificates on both sides"),
        (False, "description, tokenizer, settings"),
        (True, "start: how many tokens, and a hash of all that is public"),
        (None, "set-up: keys, first oblivious transfers (once)"),
        (None, "prompt's pass: stage by stage, bytes in both directions"),
        (False, "the server's shares of the logits"),
        (True, "one more"),
        (None, "further pass: one row, cached keys and values stay shared"),
        (True, "done"),
    )
    for number, (from_client, words) in enumerate(steps):
        y = 92 + number * 37
        if from_client is None:
            p.box(140, y - 19, 540, 26, words, SHARED)
        elif from_client:
            p.arrow(124, y, 696, y, words, CLIENT[0])
        else:
            p.arrow(696, y, 124, y, words, SERVER[0])
    return p


def traffic() -> Picture:
    """Predicted bytes of three architectures by operation."""
    p = Picture(820, 320, "Where the bytes of a prompt's pass go")
    names = {"SM+LN+G": {}, "SM+ScFuFFN": {}, "SM(t)+ScFuFFN": {"softmax": "polynomial-1"}}
    groups: dict[str, tuple[str, tuple[str, ...]]] = {
        "softmax": ("#6440b8", ("max", "exp", "normalise", "power")),
        "products": ("#a8501a", ("qkv", "scores", "values", "output", "head", "reveal", "embedding", "temperature")),
        "norms": ("#2f8f5b", ("norm", "centre")),
        "feed-forward network": ("#1f5fa8", ("up", "down", "activation", "ffn")),
    }
    p.text(40, 30, "GPT-2 small's sizes, 128 tokens, private token table, predicted by entropi cost", bold=True)
    widest = 0.0
    for row, (name, options) in enumerate(names.items()):
        config = EntropiConfig(architecture=name, **{"softmax": "power-3", **options})
        operations = cost(config, 128).prediction.prompt.by_operation()
        total = sum(one.bytes for one in operations.values())
        widest = widest or total
        x, y = 230.0, 60 + row * 62
        label = f"{name}, squares" if options else f"{name}, t=3"
        p.text(40, y + 23, label)
        left_over = dict(operations)
        for colour, members in groups.values():
            size = sum(left_over.pop(member).bytes for member in members if member in left_over)
            width = 480 * size / widest
            p.parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="34" fill="{colour}"/>')
            x += width
        assert not left_over, left_over
        p.text(x + 8, y + 23, f"{total / 1e9:.2f} GB", bold=True)
    for number, (name, (colour, _)) in enumerate(groups.items()):
        x = 230 + 130 * number
        p.parts.append(f'<rect x="{x}" y="262" width="14" height="14" fill="{colour}"/>')
        p.text(x + 20, 274, name)
    p.text(
        40,
        305,
        "The second model has a softmax alone, the third not even its maximum and clip.",
    )
    return p


PICTURES: dict[str, Callable[[], Picture]] = {
    "parties": parties,
    "shares": shares,
    "fixed-point": fixed_point,
    "linear": linear,
    "comparison": comparison,
    "softmax": softmax,
    "block": block,
    "folding": folding,
    "session": session,
    "bytes": traffic,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
