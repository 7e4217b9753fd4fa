"""What is recorded of a model's attentions: which attention, which of its layers, and the entropies of its rows.

A recorder is attached to the modules of one model, not to a thread or a context: whoever runs the model, in whichever
thread, as itself or as a replica, is recorded, and other models are not.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from entropi.entropy.patterns import Pattern

ATTACHED = "_entropi_recorders"  # an attribute of modules; replicas for data parallelism take it along
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of torch, left out of names
HIDES = -1.0e3  # additive masks hide from -65504 in float16, -1e4 by an old habit; no position bias reaches so far
_replay = threading.local()  # `depth` > 0 while a gradient checkpoint runs a forward pass again
_left_out = threading.local()  # `masks`: sizes (T, S) of masks that were left out in this pass, and if for causality


class Place(NamedTuple):
    """Where in a model an attention module stands."""

    attention: str  # its path, layer numbers replaced by *: what it shares with the other layers
    layer: int  # the model's own number of its layer
    rank: int  # how many of the attention's modules stand before it
    layers: int | None  # of the model there, those without this attention included


class _Mask(NamedTuple):
    """What a model was called with."""

    kind: str  # "none", "tokens" for a 2-D mask, "other" for one made already
    given: Tensor | None  # (B, S), or (B, 1 or H, T, S) for one made already
    queries: int | None  # T
    past: int | None  # tokens before these, in a preallocated cache
    cached: bool


@dataclass
class _Frame:
    """A model, or a model within one, that is running in this thread."""

    mask: _Mask
    gradients: bool  # whether they were on when it was called
    uses: dict[int, int] = field(default_factory=dict)  # of every attention module, by identity
    order: dict[str, int] = field(default_factory=dict)  # how many modules and uses of an attention have run
    valid: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # rows found by self-attention, by (B, T)


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
        self.frames: list[_Frame] = []
        self.calls: list[_Call] = []


@dataclass
class _Cell:
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

    def __init__(self, name: str, cells: Iterable[_Cell], layers: set[int] | None) -> None:
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
        self._cells: dict[str, dict[tuple[int, int], _Cell]] = {}
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
        matches = [each for each in found if _within(name.split("."), each.split("."))]
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
                (place.rank, use), _Cell(place, use, order, entropy.dtype)
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
        """Which rows `(B, 1, T)` of an attention under `mask` are not padding; None if all count.

        The mask of tokens that the model was called with says it. Where it was another or its shape does not fit, a row
        of self-attention is padding if its own key is hidden from it, any other if it sees nothing.

        Raises:
            ValueError: a mask that does not tell padding from text.
        """
        batch, length, total = queries.shape[0], queries.shape[2], keys.shape[2]
        frames = self._running.frames
        inner = frames[-1] if frames else None
        frame = next((f for f in reversed(frames) if f.mask.kind != "other"), None)
        if frame is not None and (found := _rows_of(frame.mask, batch, length)) is not None:
            return found
        if mask is None or (frame is not None and frame.mask.kind == "none" and frame.mask.queries == length):
            return None  # tokens without a mask: what hides keys from them is no padding
        made = inner is not None and inner.mask.kind == "other" and inner.mask.queries == length
        if inner is not None and made and inner.mask.given is not None:
            mask, total = inner.mask.given, inner.mask.given.shape[-1]  # what models hide besides is not padding
            is_causal = is_causal or inner.mask.cached
        if length == total or is_causal:
            visible = _visible(mask)
            visible = visible.expand(*visible.shape[:2], length, total)
            # With keys preallocated for what comes, the last row's own key is the last one that it sees.
            seen = visible[:, :, -1].flatten(0, 1).any(dim=0).nonzero()
            offset = total - length if length == total or not len(seen) else int(seen[-1]) + 1 - length
            if offset >= 0:
                own = visible.diagonal(offset, dim1=-2, dim2=-1)[..., :length].any(dim=1, keepdim=True)
                valid: Tensor = own.reshape(own.shape[0], 1, length).expand(batch, 1, length)
                if inner is not None:
                    inner.valid[batch, length] = valid
                return valid
        if inner is not None and (batch, length) in inner.valid:
            return inner.valid[batch, length]  # cross-attention has the rows of the self-attention before it
        if made:
            raise ValueError("this attention mask does not tell padding from text: give the model a 2-D mask of tokens")
        # Rows of something else than tokens, as patches or latents: those that see nothing fill up a batch.
        return _visible(mask).any(dim=-1).any(dim=1, keepdim=True).expand(batch, 1, length)

    def _model_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.open and not replaying():
            if not self._running.frames:
                _left_out.masks = {}
            self._running.frames.append(_Frame(_mask_of(module, args, kwargs), torch.is_grad_enabled()))

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


def _within(parts: list[str], path: list[str]) -> bool:
    """Whether `parts` are among those of a path, in their order."""
    rest = iter(path)
    return all(part in rest for part in parts)


def _visible(mask: Tensor) -> Tensor:
    """Which keys a mask shows, boolean, of four dimensions."""
    visible = mask if mask.dtype == torch.bool else mask > HIDES
    return visible.reshape((1,) * (4 - visible.dim()) + visible.shape)


def _rows_of(mask: _Mask, batch: int, length: int) -> Tensor | None:
    """Which rows `(B, 1, T)` a mask of tokens says are not padding; None where it does not speak of them."""
    tokens = mask.given
    if (
        tokens is None
        or tokens.dim() != 2
        or tokens.shape[0] != batch
        or (mask.queries is not None and mask.queries != length)
    ):
        return None
    total = tokens.shape[1]
    if total < length or (total > length and not mask.cached):
        return None
    past = mask.past if mask.past is not None and mask.past + length <= total else total - length
    return tokens[:, None, past : past + length] != 0


def _mask_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Mask:
    """What a model was called with."""
    try:
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    except TypeError:  # which the model will say itself
        given = {}
    given = {**given.pop("kwargs", {}), **given}
    mask = given.get("attention_mask")
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "hidden_states")
    inputs = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    queries = None if inputs is None or inputs.dim() < 2 else inputs.shape[1]
    cache = next((given[name] for name in ("past_key_values", "cache_params") if given.get(name) is not None), None)
    past = None
    if cache is not None and getattr(cache, "is_compileable", False):
        with suppress(ValueError):  # of a cache without attention layers
            past = int(cache.get_seq_length())
    if isinstance(mask, dict):  # of masks by kind of layer: each of them tells padding
        masks = [each for each in mask.values() if isinstance(each, Tensor)]
        mask = max(masks, key=Tensor.dim, default=None)
    if any(given.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds", "encoder_outputs")):
        return _Mask("other", None, queries, past, cache is not None)  # its mask is the encoder's, not the decoder's
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return _Mask("tokens", mask, queries, past, cache is not None)
    made = mask if isinstance(mask, Tensor) and mask.dim() == 4 else None
    return _Mask("none" if mask is None else "other", made, queries, past, cache is not None)
