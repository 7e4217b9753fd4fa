"""The private program: a folded model as a list of pure JAX stages over named values.

A stage is a function of arrays with public shapes. The same list runs in plaintext (`run_plain`), and under
secure computation, where every named value stays secret-shared between the stages and only the result is
revealed. Stages are what bytes and seconds are attributed to.

Notation: m new tokens after p cached ones, s = p + m; r rows of queries, m in all layers but the last, where
only the last token's row is needed; H heads of width k, G of them with keys and values of their own; d = H k;
n pairs of a query and a key it sees; V the vocabulary. Where several prompts share a pass, all of these numbers count
the tokens of all prompts, and each needs its last token's row: see `layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from entropi.private.compute.attention import (
    average,
    divide,
    merge_and_project,
    merge_before_norm,
    merge_heads,
    mix,
    mix_and_divide,
    normalise,
    normalise_heads,
    normalise_means,
    place,
    powers,
    project,
    project_and_place,
    scale_by_length,
    scores,
    shift_by_row_max,
    temper,
    weighted_values,
)
from entropi.private.compute.description import Description, Embedding, Output
from entropi.private.compute.embedding import add_positions, embed, lower, pair_products, pair_shift, separate
from entropi.private.compute.functions import (
    exp_by_quartic,
    exp_of_nonpositive,
    inverse_root,
    reciprocal,
    times_matrix,
)
from entropi.private.compute.layers import (
    ACTIVATIONS,
    PREPARED_FORMS,
    add_affine,
    add_normalised,
    affine,
    likeliest,
    likeliest_few,
    move,
    normalise_state,
    plain_and_gained,
    rounded,
)
from entropi.private.compute.layout import Layout
from entropi.private.compute.lookahead import BIAS, MATRIX, looks_ahead
from entropi.private.compute.settings import Settings
from entropi.private.compute.several import mix_of_prompts, scores_of_prompts, weighted_values_of_prompts
from entropi.softmax import SoftmaxForm


@dataclass(frozen=True)
class Stage:
    """One operation: reads values `inputs`, writes values `outputs`; `layer` is -1 outside the layers.

    `exact` is the function that `function` approximates, None where it computes what it says.
    """

    name: str
    layer: int
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    exact: Callable[..., Any] | None = None


def forward(
    model: Description,
    new: int,
    past: int,
    exact_softmax_as: str,
    *,
    embedding: Embedding = "private",
    paired: bool = False,
    fraction_bits: int = 18,
    output: Output = "logits",
    choices: int = 1,
    logit_bits: int | None = None,
    every_row: bool = False,
    last_rows: int = 1,
    norm_shifts: Sequence[int] = (),
    prepared: bool = False,
    layout: Layout | None = None,
) -> Iterator[Stage]:
    """Stages of one pass over `new` tokens after `past` cached ones, from the client's input to the result.

    The input is "tokens", `one_hot`, for a private table, in pairs if `paired` (see `pair_products`, which depends on
    the engine's fraction bits); or "embedded" `(m, d)`, rows of a public table, looked up by the client. The result is
    "logits" `(1, V)`; or "tokens_out" `(choices,)` and "logits_out" `(choices,)`, the likeliest tokens; or
    "tokens_out" `(1,)` alone. With `logit_bits` b these logits are whole numbers, 2^b times the logits, rounded.
    With `last_rows` n the logits are those after the last n tokens, `(n, V)`; with `every_row`, for measuring
    perplexity, those after all. Keys and values of
    all tokens seen stay behind as values "l.k" and "l.v" `(G, s, k)` for the next pass. The softmax is the
    model's own, or `exact_softmax_as` for a model that was trained with the exact one. A polynomial takes no
    maximum and weighs a pair (q k^T + offset)^(2^t), `offset` by head and row; one over the number of keys or a
    constant has no division either, and what `share_scale` says beside that number is folded away.

    With a `layout` several prompts share the pass, whose `new` and `past` are its tokens and the cached ones; inputs
    stand in its order of states, and there is a row of results for each prompt, in their order.

    With `prepared` products and comparisons every row is multiplied by the whole matrix, which then costs nothing more,
    tokens are never paired, values are mixed and divided by their weights' sums in one stage, and functions take the
    form that waits least, however many numbers there are. Queries, keys and values are computed together with the
    layer before where that is linear: see `lookahead`, whose matrices are then read.
    `norm_shifts` are those of the settings: what rows are multiplied by, as powers of two, before norms of the state.

    One layer, n = norm(state), norm(x) = x / sqrt(mean x^2 + eps):

        state' = state + softmax(q k^T) v output + output_bias,    q, k, v = n qkv + qkv_bias
        state'' = state' + act(n' up + up_bias) down + down_bias + n' ffn + ffn_bias

    with n' = norm(state'), or n where residuals are parallel; without norms, "ffn" replaces the residual state instead
    of adding to it. With norms of queries and keys, rows of q and k are divided by their root mean square before they
    rotate; with norms of branches, what attention and FFN add is divided by its own.
    """
    if layout is None:
        layout = Layout((new,), (past,))
    elif layout.prompts > 1:
        assert (last_rows, every_row, prepared) == (1, False, False), "these are for one prompt a pass"
        last_rows = layout.prompts
    softmax = model.computed_softmax(exact_softmax_as)
    read = "normed" if model.norm != "none" else "state"
    yield from embedding_stages(model, layout, embedding, paired and not prepared, fraction_bits)

    for layer in range(model.layers):
        rows = new if every_row or layer < model.layers - 1 else last_rows
        has_ffn = layer in model.explicit_ffn or model.activation != "identity"
        if model.norm != "none":
            yield from norm_stages(model, layer, norm_shifts, fraction_bits, "normed", prepared)

        base = "state"
        if model.parallel_residual:
            yield from feed_forward(model, layer, rows, read, "base", fraction_bits, prepared)
            base = "base" if has_ffn else "state"

        if not (prepared and looks_ahead(model, layer - 1)):
            yield from projection_stages(model, layer, rows, layout, read, fraction_bits, prepared)
        yield from attention_stages(model, layer, rows, layout, softmax, prepared)
        if prepared and looks_ahead(model, layer):
            following = new if every_row or layer + 1 < model.layers - 1 else last_rows
            yield from projection_stages(model, layer + 1, following, layout, read, fraction_bits, prepared)
            continue

        weights = (f"{layer}.output", f"{layer}.output_bias")
        # Without a layout where it changes nothing: then passes of as many rows share what is compiled.
        order = {"layout": layout} if layout.prompts > 1 and rows == layout.tokens > layout.prompts else {}
        if model.branch_norm:
            merging = partial(merge_before_norm, **order)
            yield Stage("output", layer, merging, ("heads", *weights), ("plain", "gained"))
            branch = ("plain", "gained", base)
            yield _norm(layer, add_normalised, branch, ("state",), fraction_bits, prepared, epsilon=model.norm_epsilon)
        else:
            merging = partial(merge_heads, rows=rows, **order)
            yield Stage("output", layer, merging, (base, "heads", *weights), ("state",))

        if not model.parallel_residual:
            if model.norm != "none" and has_ffn:
                yield from norm_stages(model, layer, norm_shifts, fraction_bits, "normed", prepared)
            yield from feed_forward(model, layer, rows, read, "state", fraction_bits, prepared)

    yield from head_stages(model, output, choices, logit_bits, norm_shifts, fraction_bits, prepared)


def embedding_stages(
    model: Description, layout: Layout, embedding: Embedding, paired: bool, fraction_bits: int
) -> Iterator[Stage]:
    """Stages from the client's input to "state" `(m, d)`, see `forward`."""
    position = ("positions",) if model.position_embedding == "learned" else ()

    if embedding == "public":
        yield Stage("embedding", -1, partial(add_positions, layout=layout), ("embedded", *position), ("state",))
    elif paired and layout.tokens > 1:
        shift = pair_shift(fraction_bits)
        products = partial(pair_products, shift=shift)
        yield Stage("embedding", -1, products, ("tokens", "embedding"), ("pairs", "raised"))
        yield Stage("embedding", -1, partial(lower, shift=shift // 2), ("pairs", "raised"), ("pairs", "raised"))
        unpaired = partial(separate, shift=shift - shift // 2, layout=layout)
        yield Stage("embedding", -1, unpaired, ("pairs", "raised", *position), ("state",))
    else:
        yield Stage("embedding", -1, partial(embed, layout=layout), ("tokens", "embedding", *position), ("state",))


def _norm(
    layer: int,
    function: Callable[..., Any],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    fraction_bits: int,
    prepared: bool,
    **how: Any,
) -> Stage:
    """A stage of rows divided by their root mean square; `function` takes the inverse root that is computed."""
    root = partial(inverse_root, fraction_bits=fraction_bits, prepared=prepared)
    approximate = partial(function, root=root, **how)
    return Stage("norm", layer, approximate, inputs, outputs, exact=partial(function, root=jax.lax.rsqrt, **how))


def norm_stages(
    model: Description, layer: int, norm_shifts: Sequence[int], fraction_bits: int, result: str, prepared: bool
) -> Iterator[Stage]:
    """Stages from "state" to its rows divided by their root mean square, of a layer or before the head (-1)."""
    shift, read = norm_shifts[layer] if norm_shifts else 0, "state"
    if shift:
        yield Stage("norm", layer, partial(move, shift=shift), ("state",), ("moved",))
        read = "moved"
    kind = model.final_norm if layer < 0 else model.norm
    epsilon = model.norm_epsilon * 4.0**shift
    yield _norm(layer, normalise_state, (read,), (result,), fraction_bits, prepared, kind=kind, epsilon=epsilon)


def projection_stages(
    model: Description, layer: int, rows: int, layout: Layout, read: str, fraction_bits: int, prepared: bool
) -> Iterator[Stage]:
    """Stages to a layer's queries "q" `(H, r, k)`, and keys and values of all tokens.

    They begin with the value `read`, or where `prepared` products look ahead with the "heads" of the layer before,
    which are also added to the state.
    """
    w = f"{layer}."
    cached = (w + "k", w + "v") if layout.before else ()
    where = dict[str, Any](frequencies=model.frequencies(layer), layout=layout)
    stage = partial(Stage, "qkv", layer)
    weights: tuple[str, ...] = (read, w + "qkv", w + "qkv_bias")
    more: tuple[str, ...] = ()
    projection: Callable[..., Any] = partial(project, model=model, rows=rows, wide=prepared)
    if prepared and looks_ahead(model, layer - 1):
        before, more = f"{layer - 1}.", ("state",)
        stage = partial(Stage, "output", layer - 1)
        weights = ("state", "heads", before + MATRIX, before + BIAS)
        projection = partial(merge_and_project, model=model, rows=rows)

    if model.query_key_norm:
        yield stage(projection, weights, (*more, "q", "new_k", "new_v", "plain"))
        rows_read, written = ("plain", "q", "new_k"), ("q", "new_k")
        yield _norm(layer, normalise_heads, rows_read, written, fraction_bits, prepared, epsilon=model.norm_epsilon)
        placing = partial(place, **where)
        yield stage(placing, ("q", "new_k", "new_v", *cached), ("q", w + "k", w + "v"))
    else:
        both = partial(project_and_place, projection=projection, read=len(weights), **where)
        yield stage(both, (*weights, *cached), (*more, "q", w + "k", w + "v"))


def attention_stages(
    model: Description, layer: int, rows: int, layout: Layout, softmax: SoftmaxForm, prepared: bool
) -> Iterator[Stage]:
    """Stages of a layer's attention, from queries, keys and values to "heads" `(H, r, k)`, divided."""
    w, several = f"{layer}.", layout.prompts > 1
    if model.temperature:
        temperature = partial(temper, rows=rows, layout=layout)
        yield Stage("temperature", layer, temperature, ("q", w + "inverse_temperature"), ("q",))
    if model.log_length:
        lengthen = partial(scale_by_length, layout=layout, positions=model.positions)
        yield Stage("length", layer, lengthen, ("q",), ("q",))

    multiply = partial(scores_of_prompts, layout=layout) if several else scores
    yield Stage("scores", layer, multiply, ("q", w + "k"), ("scores",))
    if softmax.kind == "polynomial":
        divided = not softmax.public_divisor
        weigh = partial(powers, rows=rows, layout=layout, iterations=softmax.iterations, divided=divided)
        yield Stage("power", layer, weigh, ("scores", w + "offset"), ("weights",))
    else:
        shift = partial(shift_by_row_max, rows=rows, layout=layout, prepared=prepared)
        yield Stage("max", layer, shift, ("scores",), ("shifted",))
        power = partial(exp_of_nonpositive, iterations=softmax.iterations)
        exponential = exp_by_quartic if softmax.kind == "quartic" else power
        exact = jnp.exp if model.softmax_form.exact else None
        yield Stage("exp", layer, exponential, ("shifted",), ("weights",), exact=exact)

    if softmax.public_divisor:
        mixing = partial(mix_of_prompts, rows=rows, layout=layout) if several else partial(mix, rows=rows)
        yield Stage("values", layer, mixing, ("weights", w + "v"), ("heads",))
        averaging = partial(average, layout=layout, positions=model.positions, divisor=softmax.divisor)
        yield Stage("average", layer, averaging, ("heads",), ("heads",))
        return
    mixing = partial(weighted_values, rows=rows)
    if several:
        mixing = partial(weighted_values_of_prompts, rows=rows, layout=layout)
    division = partial(normalise if softmax.of_distance else normalise_means, layout=layout)
    if prepared:  # at once, for the comparisons of a division wait for no value, and mixed values for no comparison
        joint = partial(mix_and_divide, mixing=mixing, division=division)
        yield Stage("values", layer, joint, ("weights", w + "v"), ("heads",))
    else:
        yield Stage("values", layer, mixing, ("weights", w + "v"), ("heads", "totals"))
        yield Stage("normalise", layer, division, ("heads", "totals"), ("heads",), exact=divide)


def head_stages(
    model: Description,
    output: Output,
    choices: int,
    logit_bits: int | None,
    norm_shifts: Sequence[int],
    fraction_bits: int,
    prepared: bool,
) -> Iterator[Stage]:
    """Stages from "state" behind the last layer to what is revealed, see `forward`."""
    if model.centre:
        yield Stage("centre", -1, times_matrix, ("state", "centre"), ("state",))
    if model.final_norm != "none":
        yield from norm_stages(model, -1, norm_shifts, fraction_bits, "state", prepared)
    yield Stage("head", -1, affine, ("state", "head", "head_bias"), ("logits",))

    if output == "argmax":
        yield Stage("choose", -1, likeliest, ("logits",), ("tokens_out",))
    elif output == "top_k":
        yield Stage("choose", -1, partial(likeliest_few, count=choices), ("logits",), ("logits_out", "tokens_out"))
    if logit_bits is not None and output != "argmax":
        result = "logits" if output == "logits" else "logits_out"
        yield Stage("round", -1, partial(rounded, bits=logit_bits), (result,), (result,))


def stages_of_pass(
    model: Description,
    settings: Settings,
    new: int,
    past: int,
    *,
    last_rows: int = 1,
    prepared: bool = False,
    layout: Layout | None = None,
) -> Iterator[Stage]:
    """`forward` as these settings have it: what both parties run, and what the client counts."""
    return forward(
        model,
        new,
        past,
        settings.exact_softmax_as,
        embedding=settings.embedding,
        paired=settings.paired,
        fraction_bits=settings.fraction_bits,
        output=settings.output,
        choices=settings.choices,
        logit_bits=settings.logit_bits,
        last_rows=last_rows,
        norm_shifts=settings.norm_shifts,
        prepared=prepared,
        layout=layout,
    )


def keep_first(model: Description, tokens: int) -> Stage:
    """Keys and values of the first `tokens` tokens, and no others, stay behind for the next pass. Nothing is sent."""
    names = _keys_and_values(model)
    return Stage("keep", -1, partial(_first, tokens=tokens), names, names)


def keep_prompts(model: Description, layout: Layout, staying: Sequence[int]) -> Stage:
    """Keys and values of these prompts of a pass, and of the prefix, stay behind for the next. Nothing is sent."""
    names = _keys_and_values(model)
    return Stage("keep", -1, partial(_of_prompts, layout=layout, staying=tuple(staying)), names, names)


def _keys_and_values(model: Description) -> tuple[str, ...]:
    return tuple(f"{layer}.{which}" for layer in range(model.layers) for which in "kv")


def _first(*arrays: Array, tokens: int) -> tuple[Array, ...]:
    """Of `(G, s, k)` the first tokens."""
    return tuple(array[:, :tokens] for array in arrays)


def _of_prompts(*arrays: Array, layout: Layout, staying: tuple[int, ...]) -> tuple[Array, ...]:
    """Of `(G, s, k)` the tokens of these prompts, and of the prefix."""
    places = layout.kept(staying)
    return tuple(array[:, places] for array in arrays)


def feed_forward(
    model: Description, layer: int, rows: int, read: str, result: str, fraction_bits: int, prepared: bool
) -> Iterator[Stage]:
    """Stages of a layer's FFN, the residual connection included, from `read` and "state" to the value `result`."""
    w, base = f"{layer}.", "state"
    if model.activation != "identity":
        up = partial(affine, rows=rows)
        yield Stage("ffn", layer, up, (read, w + "up", w + "up_bias"), ("hidden",))
        function, exact = ACTIVATIONS[model.activation]
        if prepared and model.activation in PREPARED_FORMS:
            function = partial(function, prepared=True)
        yield Stage("activation", layer, function, ("hidden",), ("hidden",), exact=exact)
    if layer in model.explicit_ffn:
        matrix = (w + "ffn", w + "ffn_bias")
        if model.norm == "none":
            yield Stage("ffn", layer, partial(affine, rows=rows), (base, *matrix), (result,))
        else:
            yield Stage("ffn", layer, partial(add_affine, rows=rows), (base, read, *matrix), (result,))
        base = result
    if model.branch_norm:
        down = partial(plain_and_gained, rows=rows)
        yield Stage("ffn", layer, down, ("hidden", w + "down", w + "down_bias"), ("plain", "gained"))
        branch = ("plain", "gained", base)
        yield _norm(layer, add_normalised, branch, (result,), fraction_bits, prepared, epsilon=model.norm_epsilon)
    elif model.activation != "identity":
        down = partial(add_affine, rows=rows)
        yield Stage("ffn", layer, down, (base, "hidden", w + "down", w + "down_bias"), (result,))


def warm_up(*, prepared: bool = False) -> tuple[Stage, dict[str, tuple[tuple[int, int], Literal["server", "client"]]]]:
    """A small stage that makes the engine exchange keys and base oblivious transfers; its inputs' shapes and owners.

    Without it the first use of each kind of operation would pay for them. With `prepared` products the engine compares
    logits and nothing else, for which it needs no keys, or does nothing at all (`Settings.chooses`).
    """

    def comparison(x: Array, y: Array) -> Array:
        return jnp.maximum(x + y.reshape(x.shape), 0.0)

    def operations(x: Array, y: Array) -> Array:
        product = x @ y  # private times private, then shared times shared, then shared times private
        product = product @ product @ x[:, :4]
        larger = jnp.maximum(product[:, :2], product[:, 2:])
        return exp_of_nonpositive(larger - 1.0, 1) * reciprocal(larger[:, :1] + 1.0, np.array(4))

    stage = Stage("setup", -1, comparison if prepared else operations, ("warm_x", "warm_y"), ("warm_z",))
    return stage, {"warm_x": ((4, 8), "server"), "warm_y": ((8, 4), "client")}


def warms_up(chooses: bool, *, prepared: bool) -> bool:
    """Whether a session begins with `warm_up`: one with `prepared` products only if the engine still `chooses`."""
    return chooses or not prepared


def compute_on_processor() -> None:
    """Keep JAX in this process from looking for accelerators."""
    jax.config.update("jax_platforms", "cpu")


@dataclass(frozen=True)
class Comparable:
    """A stage's function, equal to others of the same code and choices: `forward` makes them anew each time."""

    code: Callable[..., Any]
    choices: str
    function: Callable[..., Any] = field(compare=False)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Comparable:
        if isinstance(function, partial) and not function.args:
            return cls(function.func, repr(function.keywords), function)
        return cls(function, "", function)


@partial(jax.jit, static_argnums=0)
def _run_compiled(stage: Comparable, *operands: Array) -> Any:
    """What a stage's function returns; compiled once for every shape, where operations by themselves take seconds."""
    return stage.function(*operands)


def run_plain(
    model: Description,
    weights: Mapping[str, np.ndarray],
    token_ids: list[int],
    new_tokens: int,
    exact_softmax_as: str,
    *,
    exact: bool = False,
    every_row: bool = False,
    watch: Callable[[Stage, tuple[Array, ...], Array], None] | None = None,
) -> tuple[list[int], list[np.ndarray]]:
    """Greedy generation in plaintext: tokens and the logits `(V,)` they were chosen from.

    With `every_row` the logits after every token of each pass instead, `(m, V)`. Tokens follow a public prefix whose
    keys and values stand beside the weights (see `prefix`).

    With `exact` the model's own functions are computed, the exact softmax (unless it was trained with another) and
    GELU, otherwise what stands for them in a secure run, but for norms: theirs holds on rows that the settings' shifts
    have moved, and this run, by which the shifts are found, knows none. `watch` sees every stage's operands and each
    value it writes.
    """
    values: dict[str, Any] = {name: jnp.asarray(w) for name, w in weights.items()}
    fresh, past = list(token_ids), cached_tokens(weights)
    generated: list[int] = []
    all_logits: list[np.ndarray] = []
    for _ in range(new_tokens):
        values["embedded"] = values["embedding"][np.asarray(fresh)]
        stages = forward(model, len(fresh), past, exact_softmax_as, embedding="public", every_row=every_row)
        run_stages(map(_with_exact_norm, stages), values, exact=exact, watch=watch)
        past += len(fresh)
        rows = np.asarray(values["logits"])
        logits = rows if every_row else rows[-1]
        fresh = [int(rows[-1].argmax())]
        generated += fresh
        all_logits.append(logits)
    return generated, all_logits


def _with_exact_norm(stage: Stage) -> Stage:
    return replace(stage, function=stage.exact) if stage.name == "norm" and stage.exact is not None else stage


def run_stages(
    stages: Iterable[Stage],
    values: dict[str, Any],
    *,
    exact: bool = False,
    watch: Callable[[Stage, tuple[Array, ...], Array], None] | None = None,
) -> None:
    """Run stages in plaintext on named `values`, which they read and write; `exact` and `watch` as for `run_plain`."""
    for stage in stages:
        function = stage.exact if exact and stage.exact is not None else stage.function
        operands = tuple(values[name] for name in stage.inputs)
        results = _run_compiled(Comparable.of(function), *operands)
        for name, value in zip(stage.outputs, results if len(stage.outputs) > 1 else (results,)):
            values[name] = value
            if watch is not None:
                watch(stage, operands, value)


def cached_tokens(values: Mapping[str, Any]) -> int:
    """How many tokens' keys and values stand among `values`."""
    return int(values["0.k"].shape[1]) if "0.k" in values else 0
