"""`entropy_attention` in the place of transformers' attention, for models that take one by its name.

A recorded model runs as under SDPA: its configuration says "sdpa", so that it makes the masks and takes the branches
which it has for SDPA, and for the time of the recording the function of that name passes what belongs to recorded
models on to `attention_forward`. Models which SDPA cannot serve, because they have sinks or soft caps, are given the
name "entropi" instead, if transformers lets them have any implementation at all.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from entropi.entropy.announcing import NAME
from entropi.entropy.attention import entropy_attention
from entropi.entropy.patterns import Pattern, attention_pattern
from entropi.entropy.recorder import left_out_for_causality, mask_left_out, recorders, replay, replaying
from entropi.entropy.secure_softmax import HIDDEN

CONFIGURED = "_attn_implementation_internal"  # the attribute of a configuration, without its sub-configurations
CHECKPOINT = "_gradient_checkpointing_func"  # the attribute of modules under gradient checkpointing
SOFTMAXES = {"softmax", "Softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}
# What eager attention functions are called with and `attention_forward` understands, or need not.
UNDERSTOOD = {
    *("module", "query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "position_bias"),
    *("softcap", "s_aux", "sliding_window", "kwargs", "args", "training", "head_mask", "output_attentions"),
}
SELECTIONS = ("indices", "block_indices", "topk_indices")  # of keys, by models that do not put them into the mask
_lock = threading.RLock()
_gradients_wanted = [0]  # by so many recordings that are open
_held: dict[tuple[int, str], list[Any]] = {}  # what is changed for now: [how to undo it, how many want it]


def register_attention() -> None:
    """Make `attn_implementation="entropi"` known to transformers, with the mask function it needs.

    `import entropi` does it already, as soon as transformers is imported too. Models so configured compute their
    attention by `entropy_attention`; `record_entropy` collects its entropies. Calling it again changes nothing. Without
    the mask function of the same name, transformers would pass no mask, and causality would be lost.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(*args: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: what SDPA's function makes, boolean `(B, 1, T, S)`, True where a key is visible.

    None, for causality without anything else, only where there are as many queries as keys and more than one: no
    T x T mask is held where none is needed, and with other keys besides a missing mask would have to be guessed at.
    """
    from transformers.masking_utils import sdpa_mask

    queries, keys = kwargs.get("q_length"), kwargs.get("kv_length")
    skip = allow_is_causal_skip and (queries is None or (queries == keys and queries > 1))
    return sdpa_mask(*args, allow_is_causal_skip=skip, **kwargs)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `(B, H, T, D)` in, `(B, T, H, E)` out; entropies go to the recorders.

    Masks, causality and position biases mean what they mean to transformers' `sdpa_attention_forward`.

    Raises:
        ValueError: what `entropy_attention` does not have.
    """
    named = getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME
    _refuse(module, query, key, dropout, s_aux, kwargs, named=named)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    length = query.shape[2]
    causal = bool(is_causal) and attention_mask is None and length > 1
    if causal and key.shape[2] > length:
        if named:
            raise ValueError(f"{type(module).__name__} has keys that its mask is not made for: it cannot be recorded")
        # No mask means that row i sees the first i + 1 keys: those that follow are preallocated for tokens to come.
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
    if key.shape[0] != query.shape[0]:  # learned queries for all of a batch, or keys
        batch = max(key.shape[0], query.shape[0])
        query, key, value = (x.expand(batch, *x.shape[1:]) for x in (query, key, value))
    if attention_mask is None and not is_causal and length > 1 and left_out_for_causality((length, key.shape[2])):
        raise ValueError(
            f"{type(module).__name__} is not causal, yet got no mask where its model is: its attention is one thing "
            "under SDPA and another under eager"
        )
    mask = attention_mask
    if causal and key.shape[2] < length:
        mask, causal = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(), False
    mask = _with_bias(mask, position_bias, key)
    settings: dict[str, Any] = dict(is_causal=causal, scale=scaling, attn_mask=mask)
    settings["enable_gqa"] = key.shape[1] != query.shape[1]
    if softcap is not None:
        settings["softcap"] = softcap
    if s_aux is not None:
        settings["sinks"] = s_aux.flatten()
    # Masks get no gradients but from the definition: a learned bias has to have them.
    learned = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    how: Any = "reference" if learned else "auto"
    output, entropy = entropy_attention(query, key, value, **settings, implementation=how)
    if mask is not None and mask.dtype != torch.bool:
        output, entropy = _even_where_all_is_hidden(output, entropy, value, mask)
    if not torch.compiler.is_compiling() and not replaying():
        for recorder in recorders(module):
            valid = recorder.valid_rows(attention_mask, query, key, bool(is_causal))
            recorder.take(module, entropy, valid, lambda: _pattern(query, key, bool(is_causal), settings), query)
    return output.transpose(1, 2).contiguous(), None


def _refuse(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    dropout: float,
    sinks: Tensor | None,
    others: dict[str, Any],
    *,
    named: bool,
) -> None:
    """Raise ValueError where a module needs what `entropy_attention` does not have; `named`, where it asks for ours."""
    if named and not _takes_others(type(module)):
        raise ValueError(f"{type(module).__name__}: transformers supports no attention for it but its own")
    lacking = []
    if dropout:
        lacking.append("attention dropout (use model.eval(), or set it to 0)")
    if others.get("cache") is not None:
        lacking.append("a paged cache (continuous batching)")
    if named:
        lacking += [name for name in _own_arguments(type(module)) if others.get(name) is not None]
    if sinks is not None and sinks.numel() != query.shape[1]:
        lacking.append("sinks other than one a head")
    if query.dim() != 4 or key.dim() != 4:
        lacking.append(f"queries and keys of {query.dim()} and {key.dim()} dimensions")
    if lacking:
        raise ValueError(f"{type(module).__name__} needs {', '.join(lacking)}, which entropy_attention does not have")


def _with_bias(mask: Tensor | None, bias: Tensor | None, key: Tensor) -> Tensor | None:
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(key.dtype).min)
    return bias + mask


def _even_where_all_is_hidden(output: Tensor, entropy: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Output `(B, H, T, E)` and entropy `(B, H, T)` as SDPA has them where one huge number is added to all of a row.

    All keys have the same weight there. The rows are padding, and do not count; but in some models text looks at what
    becomes of them, or has such rows itself.
    """
    highest = mask.amax(dim=-1, keepdim=True)
    hidden = (highest <= HIDDEN) & highest.isfinite()
    average = value.mean(dim=2, keepdim=True).repeat_interleave(output.shape[1] // value.shape[1], dim=1)
    even = torch.where(hidden.squeeze(-1), math.log(value.shape[2]), entropy)
    return torch.where(hidden, average.to(output.dtype), output), even


def _pattern(query: Tensor, key: Tensor, is_causal: bool, settings: dict[str, Any]) -> Pattern:
    """Where the heads look, of keys without those that are preallocated for tokens to come."""
    mask = settings["attn_mask"]
    if is_causal and mask is not None and mask.shape[-1] == key.shape[2] > query.shape[2]:
        last = mask[..., -1, :].detach()
        seen = (last if last.dtype == torch.bool else last.isfinite()).flatten(0, -2).any(dim=0).nonzero()
        if len(seen) and int(seen[-1]) + 1 >= query.shape[2]:
            total = int(seen[-1]) + 1
            key, settings = key[:, :, :total], {**settings, "attn_mask": mask[..., :total]}
    return attention_pattern(query, key, **settings)


@torch.compiler.assume_constant_result
def _own_arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    """What the attention of a module's family takes besides what is understood here."""
    eager = getattr(inspect.unwrap(kind.forward), "__globals__", {}).get("eager_attention_forward")
    return (*SELECTIONS, *(_parameters(eager) if callable(eager) else ()))


@torch.compiler.assume_constant_result
def _takes_others(kind: type[nn.Module]) -> bool:
    """Whether the models in whose file a module is written take other attention than their own."""
    family = getattr(inspect.unwrap(kind.forward), "__globals__", {})
    models = [each for each in family.values() if isinstance(each, type) and hasattr(each, "_supports_sdpa")]
    models = [each for each in models if each.__module__ == family.get("__name__")]
    return not models or any(each._supports_sdpa or _supports_ours(each) for each in models)


@functools.cache
def _parameters(eager: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(eager).parameters if name not in UNDERSTOOD)


# Which modules attend, and which name serves them


def _names_used(kind: type[nn.Module]) -> frozenset[str]:
    """Global and attribute names in the methods of a class of modules, those that it inherits from torch left out."""
    names: set[str] = set()
    kinds = [each for each in kind.__mro__ if issubclass(each, nn.Module) and each is not nn.Module]
    for name in {name for each in kinds for name in vars(each)}:
        for each in (each for each in kinds if name in vars(each)):
            found = vars(each)[name]
            function = inspect.unwrap(getattr(found, "__func__", found)) if callable(found) else None
            names_here = _names_in(getattr(function, "__code__", None))
            names |= names_here
            if "super" not in names_here:
                break  # what it overrides does not run
    return frozenset(names)


def _names_in(code: Any) -> set[str]:
    if code is None:
        return set()
    return set(code.co_names).union(*(_names_in(each) for each in code.co_consts if hasattr(each, "co_names")))


def attention_modules(model: nn.Module) -> tuple[set[nn.Module], dict[nn.Module, str]]:
    """The modules of `model` whose attention can be recorded, and the paths of those which compute it themselves."""
    attending, own = set(), {}
    names = {kind: _names_used(kind) for kind in {type(module) for module in model.modules()}}
    for path, module in model.named_modules():
        used = names[type(module)]
        shows = "observe" in used if _ours(module) else "ALL_ATTENTION_FUNCTIONS" in used
        if shows and not hasattr(module, "get_correct_attn_implementation"):  # which models have
            attending.add(module)
        elif re.search("atte?n", type(module).__name__, re.IGNORECASE) and used & SOFTMAXES:
            own[module] = re.sub(r"\b\d+\b", "*", path)
    return attending, own


def _ours(module: nn.Module) -> bool:
    """Whether a module is of this package, whose models show their entropies themselves."""
    return type(module).__module__.startswith("entropi.")


def implementations(model: nn.Module, attending: set[nn.Module]) -> list[tuple[Any, str]]:
    """Every configuration in `model` with the name of the attention that it is to say while the model is recorded.

    Raises:
        ValueError: a model for which transformers supports its own attention only.
    """
    named = dict(model.named_modules())
    found: dict[int, tuple[Any, str]] = {}
    attending = {module for module in attending if not _ours(module)}
    if not attending:
        return []

    def say(config: Any, name: str) -> None:
        if hasattr(config, CONFIGURED) and found.get(id(config), (None, ""))[1] != NAME:
            found[id(config)] = config, name

    for path, module in named.items():
        owner = _owner(named, path)
        name = "sdpa" if owner is None else _serving(owner)
        if name is None and module in attending:
            raise ValueError(
                f"{type(owner).__name__} cannot be recorded: transformers supports no attention for it but its own"
            )
        say(getattr(module, "config", None), name or "sdpa")
    for config, name in list(found.values()):
        for nested in _nested(config):
            if id(nested) not in found:
                say(nested, name)
    return list(found.values())


def _owner(named: dict[str, nn.Module], path: str) -> nn.Module | None:
    """The innermost model of transformers that holds the module at `path`."""
    while True:
        module = named.get(path)
        if hasattr(module, "get_correct_attn_implementation"):
            return module
        if not path:
            return None
        path = path.rpartition(".")[0]


def _serving(owner: Any) -> str | None:
    """Which name serves a model of transformers: that of SDPA, or ours, or none."""
    try:
        owner.get_correct_attn_implementation("sdpa")
    except (ValueError, ImportError):
        return NAME if _supports_ours(owner) else None
    return "sdpa"


def _supports_ours(model: Any) -> bool:
    """Whether a model that SDPA cannot serve takes others: one tried with none may rely on the masks of its own."""
    tried = model._supports_flash_attn or model._supports_flex_attn
    return bool(model._supports_attention_backend and tried)


def _nested(config: Any) -> Iterator[Any]:
    for key in getattr(config, "sub_configs", ()):
        nested = getattr(config, key, None)
        if nested is not None:
            yield nested
            yield from _nested(nested)


# Putting it in place, for as long as anyone records


@contextmanager
def in_place(model: nn.Module, names: list[tuple[Any, str]], gradients: bool) -> Iterator[None]:
    """Let `model` attend by `attention_forward` until the block ends, compiled or not, then be as it was before.

    What gradient checkpoints compute again, after the block too, is computed as it was in the block. With `gradients`
    checkpoints are not reentrant: those know only of the gradients of what they return.
    """
    with ExitStack() as stack:
        stack.enter_context(_attending(names))
        for module in model.modules():
            if CHECKPOINT in module.__dict__:
                before = module.__dict__[CHECKPOINT]
                stack.enter_context(_changed(module, CHECKPOINT, functools.partial(_checkpoint, before, names)))
        if gradients:
            stack.enter_context(_wanting_gradients())
        stack.enter_context(_uncompiled())
        yield


@contextmanager
def _attending(names: list[tuple[Any, str]]) -> Iterator[None]:
    with ExitStack() as stack:
        if names:
            register_attention()
            stack.enter_context(_standing_in())
        for config, name in names:
            stack.enter_context(_changed(config, CONFIGURED, name))
        yield


@contextmanager
def _wanting_gradients() -> Iterator[None]:
    with _lock:
        _gradients_wanted[0] += 1
    try:
        yield
    finally:
        with _lock:
            _gradients_wanted[0] -= 1


def _checkpoint(
    before: Callable[..., Any],
    names: list[tuple[Any, str]],
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A gradient checkpoint whose second run has the attention of the first one."""
    runs = 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 1:
            return function(*args, **kwargs)
        with _attending(names), replay():
            return function(*args, **kwargs)

    if _gradients_wanted[0]:  # by whichever of several recordings
        kwargs["use_reentrant"] = False
    return before(run, *args, **kwargs)


@contextmanager
def _standing_in() -> Iterator[None]:
    """With attention of recorded modules instead of SDPA's; everyone else's stays."""
    from transformers import AttentionInterface, AttentionMaskInterface

    with ExitStack() as stack:
        for interface, stand_in in ((AttentionInterface, _attend_or), (AttentionMaskInterface, _noting)):
            stack.enter_context(_replaced(interface, "sdpa", stand_in))
        yield


@contextmanager
def _while_wanted(key: tuple[int, str], begin: Callable[[], Callable[[], Any]]) -> Iterator[None]:
    """With what `begin` changes, which returns how to undo it, until the last one who wants it is done."""
    with _lock:
        held = _held.setdefault(key, [None, 0])
        held[1] += 1
        if held[1] == 1:
            held[0] = begin()
    try:
        yield
    finally:
        with _lock:
            held[1] -= 1
            if not held[1]:
                del _held[key]
                held[0]()


def _replaced(interface: Any, name: str, stand_in: Callable[..., Any]) -> AbstractContextManager[None]:
    """With `stand_in`, which is given what it stands in for."""

    def begin() -> Callable[[], Any]:
        before = interface._global_mapping[name]
        interface.register(name, functools.partial(stand_in, before))
        return lambda: interface.register(name, before)

    return _while_wanted((id(interface), name), begin)


def _attend_or(before: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return (attention_forward if recorders(module) or replaying() else before)(module, *args, **kwargs)


def _noting(before: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    mask = before(*args, **kwargs)
    if mask is None and "q_length" in kwargs and "kv_length" in kwargs:
        mask_left_out((kwargs["q_length"], kwargs["kv_length"]), kwargs.get("allow_is_causal_skip", True))
    return mask


def _changed(owner: Any, attribute: str, value: Any) -> AbstractContextManager[None]:
    """With another value of an attribute."""

    def begin() -> Callable[[], Any]:
        before = getattr(owner, attribute)
        setattr(owner, attribute, value)
        return lambda: setattr(owner, attribute, before)

    return _while_wanted((id(owner), attribute), begin)


def _uncompiled() -> AbstractContextManager[None]:
    """With what is compiled running uncompiled: a recorder is Python that no graph holds."""

    def begin() -> Callable[[], Any]:
        stance = torch.compiler.set_stance("force_eager")
        stance.__enter__()
        return lambda: stance.__exit__(None, None, None)

    return _while_wanted((0, "stance"), begin)
