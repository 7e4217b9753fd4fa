"""What is recorded of a model's attentions: which attention, which of its layers, and the entropies of its rows.

A recorder is attached to the modules of one model, not to a thread or a context: whoever runs the model, in whichever
thread, as itself or as a replica, is recorded, and other models are not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from entropi.entropy.padding import Frame, mask_of, valid_rows
from entropi.entropy.patterns import Pattern
from entropi.entropy.recorded import Attention, Cell, Place, within

ATTACHED = "_entropi_recorders"  # an attribute of modules; replicas for data parallelism take it along
_replay = threading.local()  # `depth` > 0 while a gradient checkpoint runs a forward pass again
_left_out = threading.local()  # `masks`: sizes (T, S) of masks that were left out in this pass, and if for causality


@dataclass
class _Call:
    """An attention module that is running in this thread."""

    module: nn.Module
    use: int = 0
    order: int = 0
    seen: bool = False
    sources: list[Tensor] = field(default_factory=list)


class _Running(threading.local):
    """What of a recorder's model runs in this thread, innermost last."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.calls: list[_Call] = []


class EntropyRecorder:
    """Mean entropy of every head over everything the model was run on since recording began.

    A model with one attention, as language models have, is asked for `mean()`, `by_layer()`, `layers`, `rows` and
    `patterns` directly. Where it has several (encoder, decoder, cross-attention, a vision tower), `attentions` names
    those that ran, and a name, or parts of one that belong to no other, says which is meant: `mean("encoder")`,
    `mean("decoder.encoder_attn")`.
    """

    def __init__(
        self,
        places: dict[nn.Module, list[Place]],
        own: dict[nn.Module, str],
        layers: Iterable[int] | None,
        keep_rows: bool,
        gradients: bool,
        keep_patterns: bool,
    ) -> None:
        """Of attention modules at `places`; `own` names those which compute attention out of a recorder's sight."""
        self._places, self._own = places, own
        if isinstance(layers, int):
            raise ValueError(f"layers takes several numbers, such as [{layers}]")
        self._layers = None if layers is None else set(layers)
        self._keep_rows, self.gradients, self._keep_patterns = keep_rows, gradients, keep_patterns
        self._cells: dict[str, dict[tuple[int, int], Cell]] = {}
        self._left_out: set[int] = set()  # numbers of layers that were not asked for
        self._unseen: set[str] = set()  # names of attentions that ran without being recorded
        self._lock = threading.Lock()
        self._running = _Running()
        self.open = False

    def __deepcopy__(self, memo: dict[int, Any]) -> EntropyRecorder:
        """Itself: a copy of a model that is made while it is recorded is recorded too, until the block ends."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A closed one: a model that is saved while it is recorded takes along a recorder that does nothing."""
        return EntropyRecorder, ({}, {}, None, False, False, False)

    # What was recorded

    @property
    def attentions(self) -> dict[str, Attention]:
        """The attentions that ran, by name, in the order of their first use."""
        found = {name: Attention(name, cells.values(), self._layers) for name, cells in self._cells.items()}
        return {name: attention for name, attention in found.items() if attention.layers}

    def attention(self, name: str | None = None) -> Attention:
        """The attention of this name, whole or in parts ("encoder", "decoder.self_attn"); the only one by default.

        Raises:
            RuntimeError: nothing was recorded.
            ValueError: no attention of this name, or several.
        """
        found = self.attentions
        if not found and not self._unseen:
            if self._left_out:
                seen = ", ".join(map(str, sorted(self._left_out)))
                raise RuntimeError(f"none of the layers asked for was run, but these with attention: {seen}")
            raise RuntimeError("no attention was recorded: run the model inside the `with` block")
        unseen = f"; not recorded, as they compute it themselves: {', '.join(sorted(self._unseen))}"
        listed = (", ".join(found) or "none") + (unseen if self._unseen else "")
        if name is None:
            if len(found) + len(self._unseen) > 1 or not found:
                raise ValueError(f"the model has several attentions, say which one is meant: {listed}")
            return next(iter(found.values()))
        if name in found:
            return found[name]
        matches = [each for each in found if within(name.split("."), each.split("."))]
        if len(matches) != 1:
            raise ValueError(f"{name!r} names {len(matches) or 'none'} of the model's attentions: {listed}")
        return found[matches[0]]

    def mean(self, attention: str | None = None) -> Tensor:
        """`(layers, heads)` nats, the mean over all rows that are not padding (Eq. 5-7 of 2501.03489).

        Raises:
            RuntimeError: nothing was recorded.
            ValueError: several attentions and none named, or layers with different numbers of heads.
        """
        return self.attention(attention).mean()

    def by_layer(self, attention: str | None = None) -> dict[int, Tensor]:
        """Of every layer `(heads,)` nats, by the model's own numbers; layers may differ in heads.

        Raises:
            RuntimeError: nothing was recorded.
            ValueError: several attentions and none named.
        """
        return self.attention(attention).by_layer()

    @property
    def layers(self) -> list[int]:
        """The numbers that the model itself gives the layers seen, in the order of `mean`'s rows."""
        return self.attention().layers if self._cells else []

    @property
    def num_layers(self) -> int | None:
        """Layers of the model, those without attention included; None where that is not known."""
        return self.attention().num_layers

    @property
    def rows(self) -> dict[int, list[Tensor]]:
        """Of every layer the entropies themselves, `(B, H, T)` nats a forward pass; empty without `keep_rows`."""
        return self.attention().rows if self._cells else {}

    @property
    def patterns(self) -> dict[int, list[Pattern]]:
        """Of every layer where its heads looked, a forward pass each; empty without `keep_patterns`."""
        return self.attention().patterns if self._cells else {}

    # Recording

    @contextmanager
    def attached(self, models: Iterable[nn.Module]) -> Iterator[None]:
        """Be shown what the modules do until the block ends; `models` are those that are called with masks."""
        hooks = []
        for model in models:
            hooks.append(model.register_forward_pre_hook(self._model_begins, with_kwargs=True))
            hooks.append(model.register_forward_hook(self._model_ends, always_call=True))
        for module in self._places:
            hooks.append(module.register_forward_pre_hook(self._attention_begins))
            hooks.append(module.register_forward_hook(self._attention_ends, always_call=True))
            module.__dict__[ATTACHED] = (*module.__dict__.get(ATTACHED, ()), self)
        hooks.extend(module.register_forward_hook(self._own_attention_ran) for module in self._own)
        # Replicas are other objects with the same attributes: they are known by what is written on them.
        for module, places in self._places.items():
            module.__dict__[f"{ATTACHED}_{id(self)}"] = places
        self.open = True
        try:
            yield
        finally:
            self.open = False
            for hook in hooks:
                hook.remove()
            for module in self._places:
                rest = tuple(each for each in module.__dict__[ATTACHED] if each is not self)
                del module.__dict__[f"{ATTACHED}_{id(self)}"]
                if rest:
                    module.__dict__[ATTACHED] = rest
                else:
                    del module.__dict__[ATTACHED]

    def take(
        self,
        module: nn.Module,
        entropy: Tensor,
        valid: Tensor | None,
        pattern: Callable[[], Pattern] | None,
        source: Tensor | None = None,
    ) -> None:
        """Add `(B, H, T)` entropies of one layer; `valid` `(B, 1, T)` marks the rows that are not padding.

        `source` are the queries: a module may attend with the same ones twice, over halves of its values.
        """
        running = self._running
        call = running.calls[-1] if running.calls and running.calls[-1].module is module else None
        for each in running.calls:
            each.seen = True
        if call is not None and source is not None:
            if any(each is source for each in call.sources):
                return
            call.sources.append(source)
        if self.gradients and running.frames and running.frames[0].gradients and not torch.is_grad_enabled():
            raise ValueError(
                f"gradients=True, but {type(module).__name__} ran without gradients: a gradient checkpoint of one's "
                "own with use_reentrant=True, use False"
            )
        use, order = (call.use, call.order) if call is not None else (0, 0)
        places: list[Place] = module.__dict__[f"{ATTACHED}_{id(self)}"]
        place = places[min(use, len(places) - 1)]
        use = max(use - len(places) + 1, 0)
        if call is None:
            order = place.rank
        if self._layers is not None and order == place.rank and place.layer not in self._layers:
            self._left_out.add(place.layer)
            if order not in self._layers:  # a module that is used out of its order is shared: numbered when asked for
                return
        if not self.gradients:
            entropy = entropy.detach()
        seen = pattern() if self._keep_patterns and pattern is not None else None
        with self._lock:
            cell = self._cells.setdefault(place.attention, {}).setdefault(
                (place.rank, use), Cell(place, use, order, entropy.dtype)
            )
            if self.gradients:
                # Not now: within a checkpoint, what the sum keeps for its gradient would be missed the second time.
                cell.pending.append((entropy, valid))
            else:
                cell.add(entropy, valid)
            if self._keep_rows:
                cell.rows.append(entropy)
            if seen is not None:
                cell.patterns.append(seen)

    def valid_rows(self, mask: Tensor | None, queries: Tensor, keys: Tensor, is_causal: bool) -> Tensor | None:
        """Which rows `(B, 1, T)` of an attention that runs now are not padding; see `padding.valid_rows`."""
        return valid_rows(self._running.frames, mask, queries, keys, is_causal)

    def _model_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.open and not replaying():
            if not self._running.frames:
                _left_out.masks = {}
            self._running.frames.append(Frame(mask_of(module, args, kwargs), torch.is_grad_enabled()))

    def _model_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.open and not replaying() and self._running.frames:
            self._running.frames.pop()

    def _attention_begins(self, module: nn.Module, args: Any) -> None:
        if not self.open or replaying():
            return
        call = _Call(module)
        if self._running.frames:
            frame, name = self._running.frames[-1], module.__dict__[f"{ATTACHED}_{id(self)}"][0].attention
            call.use, call.order = frame.uses.get(id(module), 0), frame.order.get(name, 0)
            frame.uses[id(module)], frame.order[name] = call.use + 1, call.order + 1
        else:
            call.order = module.__dict__[f"{ATTACHED}_{id(self)}"][0].rank
        self._running.calls.append(call)

    def _attention_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.open or replaying() or not self._running.calls:
            return
        call = self._running.calls.pop()
        if not call.seen and output is not None:  # None after an exception
            raise ValueError(
                f"{type(module).__name__} computed its attention without transformers' attention interface: "
                "it cannot be recorded"
            )

    def _own_attention_ran(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.open and not replaying():
            self._unseen.add(self._own[module] if module in self._own else type(module).__name__)


def recorders(module: nn.Module) -> tuple[EntropyRecorder, ...]:
    """The recorders that are attached to a module and open."""
    return tuple(recorder for recorder in module.__dict__.get(ATTACHED, ()) if recorder.open)


def observe(
    module: nn.Module, entropy: Tensor, valid: Tensor | None = None, pattern: Callable[[], Pattern] | None = None
) -> None:
    """Show the entropies of a layer to the recorders of its model; `pattern` is called if one wants it."""
    if torch.compiler.is_compiling() or replaying():
        return  # `record_entropy` runs compiled models uncompiled; what is computed again was recorded before
    for recorder in recorders(module):
        recorder.take(module, entropy, valid, pattern)


def mask_left_out(sizes: tuple[int, int], for_causality: bool) -> None:
    """Note that no mask was made for attention of `(T, S)`, as causality says it all, or as all is visible."""
    _left_out.__dict__.setdefault("masks", {})[sizes] = for_causality


def left_out_for_causality(sizes: tuple[int, int]) -> bool:
    """Whether the last mask of `(T, S)` in this pass was left out because causality says it all."""
    return bool(_left_out.__dict__.get("masks", {}).get(sizes))


def replaying() -> bool:
    """Whether a gradient checkpoint runs a forward pass again, in this thread."""
    return getattr(_replay, "depth", 0) > 0 or torch._C._current_graph_task_id() != -1


@contextmanager
def replay() -> Iterator[None]:
    """A forward pass that was recorded before."""
    _replay.depth = getattr(_replay, "depth", 0) + 1
    try:
        yield
    finally:
        _replay.depth -= 1
