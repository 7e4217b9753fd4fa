"""What was recorded of a model's attentions, by their places in it: mean entropies, rows, where heads looked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from entropi.entropy.patterns import Pattern

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of torch, left out of names


class Place(NamedTuple):
    """Where in a model an attention module stands."""

    attention: str  # its path, layer numbers replaced by *: what it shares with the other layers
    layer: int  # the model's own number of its layer
    rank: int  # how many of the attention's modules stand before it
    layers: int | None  # of the model there, those without this attention included


def placed(model: nn.Module, modules: set[nn.Module]) -> dict[nn.Module, list[Place]]:
    """Where `modules` stand in `model`; several places for one that stands in several layers."""
    paths: dict[str, list[tuple[tuple[int, ...], nn.Module]]] = {}
    named: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parts = [part for part in path.split(".") if part not in WRAPPERS]
        named[".".join(parts)] = module
        if module in modules:
            numbers = tuple(int(part) for part in parts if part.isdigit())
            pattern = ".".join("*" if part.isdigit() else part for part in parts)
            paths.setdefault(pattern, []).append((numbers, module))
    places: dict[nn.Module, list[Place]] = {}
    for pattern, found in paths.items():
        found.sort(key=lambda each: each[0])
        width = len(found[0][0])
        varying = [i for i in range(width) if len({numbers[i] for numbers, _ in found}) > 1]
        # Numbers that do not vary are those of sub-layers; where two vary, as of stages and blocks, all are counted.
        counted = None if len(varying) > 1 or not width else (varying or [0])[0]
        for rank, (numbers, module) in enumerate(found):
            layers = None
            if counted is not None:
                holder = named.get(_before(pattern, numbers, counted))
                layers = len(holder) if isinstance(holder, nn.ModuleList | nn.Sequential) else None
            layer = rank if counted is None else numbers[counted]
            places.setdefault(module, []).append(Place(pattern, layer, rank, layers or (len(found) if width else 1)))
    return places


def _before(pattern: str, numbers: tuple[int, ...], position: int) -> str:
    """The path of what holds the number at `position` of a pattern."""
    parts, seen = [], 0
    for part in pattern.split("."):
        if part == "*":
            if seen == position:
                break
            part, seen = str(numbers[seen]), seen + 1
        parts.append(part)
    return ".".join(parts)


def within(parts: list[str], path: list[str]) -> bool:
    """Whether `parts` are among those of a path, in their order."""
    rest = iter(path)
    return all(part in rest for part in parts)


@dataclass
class Cell:
    """What was recorded of one use of one attention module."""

    place: Place
    use: int
    order: int  # among all uses of modules of this attention in a pass
    dtype: torch.dtype
    sums: Tensor | None = None
    count: Tensor | None = None
    pending: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)  # entropies with gradients, valid rows
    rows: list[Tensor] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)

    def add(self, entropy: Tensor, valid: Tensor | None) -> None:
        """Add entropies `(B, H, T)` of which the rows `(B, 1, T)` count."""
        wide = torch.float32 if entropy.device.type == "mps" else torch.float64
        weights = torch.ones_like(entropy[:, :1]) if valid is None else valid.to(entropy)
        total = (entropy * weights).sum(dim=(0, 2), dtype=wide)
        count = weights.expand_as(entropy[:, :1]).sum(dtype=wide)
        self.sums = total if self.sums is None else self.sums + total.to(self.sums.device)
        self.count = count if self.count is None else self.count + count.to(self.count.device)

    def mean(self) -> Tensor:
        """`(heads,)` nats."""
        for entropy, valid in self.pending:
            self.add(entropy, valid)
        self.pending.clear()
        assert self.sums is not None
        assert self.count is not None
        if not bool(self.count):
            raise ValueError("no row was recorded that is not padding")
        return (self.sums / self.count).to(self.dtype)


class Attention:
    """What was recorded of one attention of a model: a decoder's self-attention, an encoder's, cross-attention.

    Attributes:
        name: the path of its modules, with * for the layer.
        num_layers: layers of the model there, those without this attention included; None where that is not known.
    """

    def __init__(self, name: str, cells: Iterable[Cell], layers: set[int] | None) -> None:
        self.name = name
        cells = list(cells)
        # A module that is used several times in a pass is as many layers, in the order of their use.
        shared = any(cell.use for cell in cells)
        numbered = {cell.order if shared else cell.place.layer: cell for cell in cells}
        self._cells = {n: numbered[n] for n in sorted(numbered) if layers is None or n in layers}
        self.num_layers: int | None = max(numbered) + 1 if shared else cells[0].place.layers

    @property
    def layers(self) -> list[int]:
        """The numbers that the model itself gives the layers seen, in the order of `mean`'s rows."""
        return list(self._cells)

    @property
    def rows(self) -> dict[int, list[Tensor]]:
        """Of every layer the entropies themselves, `(B, H, T)` nats a forward pass; empty without `keep_rows`."""
        return {layer: cell.rows for layer, cell in self._cells.items() if cell.rows}

    @property
    def patterns(self) -> dict[int, list[Pattern]]:
        """Of every layer where its heads looked, a forward pass each; empty without `keep_patterns`."""
        return {layer: cell.patterns for layer, cell in self._cells.items() if cell.patterns}

    def by_layer(self) -> dict[int, Tensor]:
        """Of every layer `(heads,)` nats: the mean over all rows that are not padding; layers may differ in heads."""
        return {layer: cell.mean() for layer, cell in self._cells.items()}

    def mean(self) -> Tensor:
        """`(layers, heads)` nats, the mean over all rows that are not padding (Eq. 5-7 of 2501.03489).

        Raises:
            ValueError: layers with different numbers of heads.
        """
        found = self.by_layer()
        heads = {len(entropy): layer for layer, entropy in reversed(found.items())}
        if len(heads) > 1:
            (a, first), (b, second) = list(heads.items())[:2]
            raise ValueError(
                f"the layers of {self.name} differ in heads, layer {first} has {a} and layer {second} has {b}: "
                "by_layer() gives them one by one"
            )
        device = next(iter(found.values())).device
        return torch.stack([entropy.to(device) for entropy in found.values()])
