"""The private program: its stages compute the layer equations in plaintext, and under every protocol in fixed point."""

import asyncio
import json
import re
import secrets
import shutil
import tempfile

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import msgspec  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from entropi.errors import UserError  # noqa: E402
from entropi.private.compute import (  # noqa: E402
    attention,
    fixed_point,
)
from entropi.private.compute.description import Description  # noqa: E402
from entropi.private.compute.embedding import one_hot, pair_limit  # noqa: E402
from entropi.private.compute.fixed_point import (  # noqa: E402
    Ranges,
    can_pair,
    largest_product,
    measure_ranges,
    problems,
    safe_fraction_bits,
    select_fraction_bits,
    sweep_vocabulary,
)
from entropi.private.compute.folded import load_folded  # noqa: E402
from entropi.private.compute.program import Stage, forward, run_plain, warms_up  # noqa: E402
from entropi.private.compute.settings import CLIENT, SERVER, Settings, trust  # noqa: E402
from entropi.private.wire.messages import Failed, Job, Revealed  # noqa: E402
from private_reference import FIELDS, VARIANTS, describe, random_weights, reference_logits  # noqa: E402

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SETTINGS = Settings(exact_softmax_as="power-6")
FEWER_BITS = 14


@pytest.fixture
def _double_precision():
    with jax.experimental.enable_x64():
        yield


@pytest.mark.usefixtures("_double_precision")
@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_compute_the_layer_equations(variant):
    """Prompt and a cached pass; the reference knows neither caching nor folding the last layer's rows away."""
    model = describe(**VARIANTS[variant])
    weights = random_weights(model, dtype=np.float64)
    generated, logits = run_plain(model, weights, PROMPT, 2, "power-5", exact=True)
    for step, got in enumerate(logits):
        expected = reference_logits(model, weights, PROMPT + generated[:step])
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


@pytest.fixture
def _compiled_anew():
    """Stages that read a changed constant while they are compiled are not left behind for others."""
    yield
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.usefixtures("_double_precision", "_compiled_anew")
def test_long_prompts_are_scored_in_blocks(monkeypatch):
    model = describe(layers=2, key_value_heads=2)
    weights = random_weights(model, dtype=np.float64)
    prompt = np.random.default_rng(0).integers(0, 53, 21).tolist()
    for rows in (4, 7, 20):
        monkeypatch.setattr(attention, "BLOCK_ROWS", rows)
        jax.clear_caches()
        generated, logits = run_plain(model, weights, prompt, 2, "power-5", exact=True)
        for step, got in enumerate(logits):
            expected = reference_logits(model, weights, prompt + generated[:step])
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("_double_precision")
def test_models_trained_with_a_kernel_keep_it():
    """Neither the settings' t nor the exact exponential takes the place of the model's own softmax."""
    model = describe(**VARIANTS["kernel"])
    weights = random_weights(model, dtype=np.float64)
    (own,), (other,), (exact,) = (
        run_plain(model, weights, PROMPT, 1, f"power-{t}", exact=e)[1] for t, e in [(3, False), (7, False), (7, True)]
    )
    np.testing.assert_array_equal(own, other)
    np.testing.assert_allclose(own, exact, atol=1e-4)  # exact in its division only


SIMULATED = {
    "softmax only": dict(softmax="power-5"),
    "temperature": dict(softmax="power-3"),
    "polynomial": {},
    "powers": {},
    "layer norm": {},
    "rms norm, linear map and branch": {},
    "square": {},
    "llama": {},
    "gpt-neox": {},
    "gemma3": {},
    "parallel, no norm": {},
}


def simulate(protocol, model, weights, passes, settings=SETTINGS, **options):
    """Values after a pass over each list of tokens, and the stages' communication."""
    pytest.importorskip("spu")
    from entropi.private.compute.engine import Simulation

    engine = Simulation(protocol, settings)
    options = (
        dict(paired=settings.paired, fraction_bits=settings.fraction_bits, norm_shifts=settings.norm_shifts) | options
    )
    for name, weight in weights.items():
        engine.hold(name, weight, 0)
    past, found, communication = 0, [], []
    for tokens in passes:
        if options.get("embedding") == "public":
            engine.hold("embedded", weights["embedding"][tokens], 1)
        else:
            engine.hold("tokens", one_hot(tokens, model.vocab_size, settings.paired, settings.fraction_bits), 1)
        for stage in forward(model, len(tokens), past, settings.exact_softmax_as, **options):
            communication.append(engine.run(stage))
        past += len(tokens)
        found.append({name: engine.reveal(name) for name in ("logits", *stage.outputs)})
    return found, communication


QUICK = {"llama", "powers"}  # the rest is slow


@pytest.mark.parametrize(
    "protocol", ["ref2k", *(pytest.param(name, marks=pytest.mark.slow) for name in ("semi2k", "aby3"))]
)
@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in SIMULATED]
)
def test_simulated_logits_are_the_plain_ones(variant, protocol):
    model = describe(**{**VARIANTS[variant], **SIMULATED[variant]})
    weights = random_weights(model)
    generated, expected = run_plain(model, weights, PROMPT, 2, "power-6")
    found, _ = simulate(protocol, model, weights, [PROMPT, generated[:1]])
    for got, plain in zip(found, expected):
        np.testing.assert_allclose(got["logits"][0], plain, atol=0.004)


@pytest.mark.two_party
def test_logits_under_cheetah_are_the_plain_ones():
    """Every kind of operation at once, in threads; real processes are tests/private/sessions/test_two_party.py's."""
    changes = dict(
        parallel_residual=False, temperature=True, activation="gelu", intermediate_size=40, softmax="power-3"
    )
    model = describe(**{**VARIANTS["llama"], **changes})
    weights = random_weights(model)
    generated, expected = run_plain(model, weights, PROMPT, 2, "power-6")
    found, communication = simulate("cheetah", model, weights, [PROMPT, generated[:1]], output="top_k", choices=3)
    for got, plain in zip(found, expected):
        np.testing.assert_allclose(got["logits"][0], plain, atol=0.004)
        np.testing.assert_array_equal(np.rint(got["tokens_out"]), np.argsort(-plain)[:3])
    names = {stage.name for stage in communication}
    assert names == {
        "embedding", "norm", "qkv", "temperature", "scores", "max", "exp", "values", "normalise", "output", "ffn",
        "activation", "head", "choose",
    }  # fmt: skip
    assert all(stage.bytes > 0 for stage in communication)


async def two_processes(folder, model, weights, settings, prompt, new_tokens):
    """The client's results of a generation by two real parties."""
    from entropi.private.sessions.party_handle import Party

    save_file(weights, folder / "weights.safetensors")
    save_file({"embedding": weights["embedding"]}, folder / "table.safetensors")
    # Parties have no TCP. Both sockets in the one folder that either may write to.
    sockets = tempfile.mkdtemp(prefix="link-", dir="/tmp")
    links = tuple(f"unix:{sockets}/{name}" for name in ("server", "client"))
    common = dict(
        session=secrets.token_hex(16),
        links=links,
        description=model,
        settings=settings,
        max_new_tokens=new_tokens,
        prompt_length=len(prompt),
    )
    table = str(folder / "table.safetensors") if settings.embedding == "public" else None
    server = await Party.start(Job(rank=SERVER, weights=str(folder / "weights.safetensors"), **common))
    client = await Party.start(Job(rank=CLIENT, prompt=prompt, table=table, **common))
    found = []

    async def serve():
        while (event := await server.event()) is not None:
            assert not isinstance(event, Failed), event
            if isinstance(event, Revealed):
                assert event.logits is None
                assert event.tokens is None
                await server.proceed()

    serving = asyncio.create_task(serve())
    try:
        while (event := await asyncio.wait_for(client.event(), 120)) is not None:
            assert not isinstance(event, Failed), event
            if isinstance(event, Revealed):
                found.append(event)
                await client.proceed(1, [event.tokens[0] if event.tokens else int(np.argmax(event.logits))])
        await asyncio.wait_for(serving, 60)
    finally:
        serving.cancel()
        for party in (server, client):
            await party.stop()
        shutil.rmtree(sockets)
    return found


@pytest.mark.two_party
@pytest.mark.parametrize(
    "options",
    [
        dict(paired=True),
        dict(output="top_k", choices=3, paired=True),
        dict(output="argmax", embedding="public"),
        dict(paired=True, logit_bits=4),
    ],
    ids=["logits", "top_k", "argmax", "rounded"],
)
def test_two_processes_learn_what_the_settings_say(options, tmp_path):
    pytest.importorskip("spu")
    model = describe(**{**VARIANTS["llama"], "layers": 2})
    weights = random_weights(model)
    settings = Settings(exact_softmax_as="power-6", **options)
    generated, logits = run_plain(model, weights, PROMPT[:5], 2, "power-6")
    found = asyncio.run(two_processes(tmp_path, model, weights, settings, PROMPT[:5], 2))
    for event, plain, token in zip(found, logits, generated, strict=True):
        order = np.argsort(-plain)
        if settings.output == "logits":
            assert event.tokens is None
            step = 0.0 if settings.logit_bits is None else 2.0**-settings.logit_bits
            np.testing.assert_allclose(event.logits, plain, atol=0.004 + step / 2)
            assert not step or not (np.array(event.logits) % step).any()
        elif settings.output == "top_k":
            assert event.tokens == order[:3].tolist()
            np.testing.assert_allclose(event.logits, plain[order[:3]], atol=0.004)
        else:
            assert event.tokens == [token]
            assert event.logits is None


@pytest.mark.parametrize("embedding", ["private", "public"])
@pytest.mark.parametrize("output", ["logits", "top_k", "argmax"])
def test_options_of_embedding_and_output(embedding, output):
    model = describe(layers=1)
    weights = random_weights(model)
    _, (plain,) = run_plain(model, weights, PROMPT, 1, "power-6")
    (found,), _ = simulate("ref2k", model, weights, [PROMPT], embedding=embedding, output=output, choices=4)
    order = np.argsort(-plain)
    if output == "argmax":
        assert found.keys() == {"logits", "tokens_out"}
        assert np.rint(found["tokens_out"]).tolist() == [order[0]]
    elif output == "top_k":
        np.testing.assert_array_equal(np.rint(found["tokens_out"]), order[:4])
        np.testing.assert_allclose(found["logits_out"], plain[order[:4]], atol=0.002)
    else:
        np.testing.assert_allclose(found["logits"][0], plain, atol=0.002)


@pytest.mark.parametrize("protocol", ["ref2k", pytest.param("cheetah", marks=pytest.mark.two_party)])
@pytest.mark.parametrize("bits", [0, 3])
def test_rounded_logits_tell_nothing_below_the_step(protocol, bits):
    """Every logit is the nearest multiple of the step, always the same: asking again averages nothing away."""
    pytest.importorskip("spu")
    from entropi.private.compute.engine import Simulation

    step = 2.0**-bits
    (stage,) = [s for s in forward(describe(), 1, 0, "power-5", logit_bits=bits) if s.name == "round"]
    exact = np.random.default_rng(2).uniform(-20, 20, 16).astype(np.float32)
    distance = np.abs(exact / step - np.floor(exact / step) - 0.5)
    exact = exact[distance > 2.0**-12]  # fixed point may move what lies between two steps
    repeated = np.tile(exact, 16)
    engine = Simulation(protocol, Settings())
    engine.hold("server's", repeated - np.float32(3.25), 0)
    engine.hold("client's", np.full_like(repeated, 3.25), 1)
    engine.run(Stage("add", -1, lambda a, b: a + b, ("server's", "client's"), ("logits",)))
    engine.run(stage)
    found = engine.reveal("logits").reshape(16, -1) * step
    np.testing.assert_array_equal(found, np.tile(np.rint(exact / step) * step, (16, 1)))


def test_settings_of_rounding():
    model = describe(layers=1)
    weights = random_weights(model)
    for output in ("logits", "top_k"):
        (found,), _ = simulate("ref2k", model, weights, [PROMPT], output=output, choices=4, logit_bits=2)
        _, (plain,) = run_plain(model, weights, PROMPT, 1, "power-6")
        expected = plain if output == "logits" else np.sort(plain)[::-1][:4]
        got = found["logits"][0] if output == "logits" else found["logits_out"]
        assert (got == np.rint(got)).all()
        assert np.abs(got / 4 - expected).max() < 0.125 + 0.01
    assert "learns the logits, rounded to 0.25, the architecture" in trust(Settings(logit_bits=2))
    with pytest.raises(msgspec.ValidationError, match="no logits are revealed"):
        msgspec.convert({"output": "argmax", "logit_bits": 2}, Settings)
    huge = enlarged_head(model, weights, 2.0**23)
    assert select_fraction_bits(model, huge, SETTINGS, [PROMPT])
    with pytest.raises(UserError, match=r"logits reach 8\.39e\+06, and rounding them to 4 binary places"):
        select_fraction_bits(model, huge, Settings(exact_softmax_as="power-6", logit_bits=4), [PROMPT])


@pytest.mark.parametrize("protocol", ["ref2k", pytest.param("cheetah", marks=pytest.mark.two_party)])
@pytest.mark.parametrize("fraction_bits", [18, 19, 22])
@pytest.mark.parametrize("tokens", [[7], [7, 7], [3, 50, 3, 0, 52], [1, 2, 1, 1]])
def test_pairs_of_tokens_are_told_apart(protocol, fraction_bits, tokens):
    """With values up to the bound; the smaller of a pair must survive next to the larger, in either place."""
    pytest.importorskip("spu")
    from entropi.private.compute.engine import Simulation

    largest = 0.998 * pair_limit(fraction_bits)
    table = np.random.default_rng(1).uniform(-largest, largest, (53, 24)).astype(np.float32)
    table[7], table[3] = largest, -largest
    table[1] *= 1e-3
    settings = Settings(fraction_bits=fraction_bits, paired=True)
    assert can_pair({"embedding": table}, settings)
    engine = Simulation(protocol, settings)
    engine.hold("tokens", one_hot(tokens, 53, True, fraction_bits), 1)
    engine.hold("embedding", table, 0)
    model = describe(position_embedding="rotary", rotary_dimensions=2)
    stages = list(forward(model, len(tokens), 0, "power-5", paired=True, fraction_bits=fraction_bits))
    for stage in stages:
        if stage.name == "embedding":
            engine.run(stage)
    np.testing.assert_allclose(engine.reveal("state"), table[tokens], atol=4 * 2.0**-fraction_bits)
    assert sum(stage.name == "embedding" for stage in stages) == (3 if len(tokens) > 1 else 1)


def test_pairs_only_where_they_fit():
    model = describe()
    weights = random_weights(model)

    def pairs(**changes):
        settings, lines = select_fraction_bits(model, weights, Settings(**changes), [PROMPT])
        return settings.paired, lines[1:]

    assert pairs() == (True, [])
    assert pairs(embedding="public") == (False, [])
    assert pairs(fraction_bits=17) == (False, ["tokens are looked up one by one: pairs need 18 fraction bits or more"])
    paired, (line,) = pairs(fraction_bits=19)
    assert not paired
    assert re.fullmatch(r"tokens .* one by one: the table reaches 2\.\d+, and pairs need it below 1", line)
    weights["embedding"][5, 5] = 4.5
    assert pairs() == (False, ["tokens are looked up one by one: the table reaches 4.5, and pairs need it below 4"])
    weights["embedding"] *= 0.2
    assert pairs(fraction_bits=19) == (True, [])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (dict(embedding="public"), "the embedding is public"),
        (dict(fraction_bits=17), "fewer than 18 fraction bits"),
        (dict(fraction_bits=11), "fraction_bits"),
        (dict(fraction_bits=23), "fraction_bits"),
        (dict(ring_bits=32), "ring_bits"),
    ],
)
def test_settings_that_no_engine_can_run_are_refused(changes, complaint):
    settings = {**msgspec.to_builtins(Settings(paired=True)), **changes}
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.json.decode(json.dumps(settings), type=Settings)


def test_trust_says_what_is_learnt():
    assert "the client learns the logits," in trust(Settings())
    assert "the client learns the likeliest token," in trust(Settings(output="argmax"))
    assert "learns the 3 likeliest tokens and their logits," in trust(Settings(output="top_k", choices=3))
    assert "embeddings are public" in trust(Settings(embedding="public"))


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 5}, {"hidden_size": 0}, {"layers": 10**6}, {"vocab_size": 2**30}, {"explicit_ffn": [7]},
        {"norm_epsilon": 0.0}, {"format": 1}, {"extra": 1}, {"layers": "3"}, {"architecture": "x" * 1000},
        {"key_value_heads": 3}, {"activation": "gelu"}, {"intermediate_size": 8}, {"norm": "batch"},
        {"softmax": "power-0"}, {"softmax": "power-9"}, {"rotary_dimensions": 2},
        {"position_embedding": "rotary"}, {"position_embedding": "rotary", "rotary_dimensions": 3},
        {"position_embedding": "rotary", "rotary_dimensions": 8},
    ],
)  # fmt: skip
def test_descriptions_are_validated(change):
    assert msgspec.json.decode(json.dumps(FIELDS), type=Description).layers == 3
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(json.dumps({**FIELDS, **change}), type=Description)


@pytest.mark.parametrize("softmax", ["power-10", "polynomial", "", "x" * 40, None, 3, "polynomial-1\n"])
def test_a_softmax_that_nobody_knows_is_no_description_s_and_no_settings_(softmax):
    """What a party may send."""
    assert msgspec.json.decode(b'{"exact_softmax_as": "power-3"}', type=Settings).exact_softmax_as == "power-3"
    with pytest.raises(msgspec.ValidationError, match=r"softmax must be|Expected `str`"):
        msgspec.json.decode(json.dumps({**FIELDS, "softmax": softmax}), type=Description)
    for text in (softmax, "exact", "polynomial-1", "power-9"):
        with pytest.raises(msgspec.ValidationError, match=r"exact_softmax_as must be quartic|Expected `str`"):
            msgspec.json.decode(json.dumps({"exact_softmax_as": text}), type=Settings)


def test_a_temperature_of_a_polynomial_is_no_description_s():
    assert "0.offset" in describe(softmax="polynomial-1").weight_shapes()
    with pytest.raises(msgspec.ValidationError, match="softmax polynomial-1 has offsets instead of a temperature"):
        msgspec.convert({**FIELDS, "softmax": "polynomial-1", "temperature": True}, Description)


@pytest.mark.parametrize("name", ["softmax only", "kernel", "polynomial"])
def test_folded_models_of_format_2_are_read(tmp_path, name):
    """They had two settings for the softmax."""
    model = describe(**VARIANTS[name])
    form = model.softmax_form
    weights = random_weights(model)
    save_file(weights, tmp_path / "folded.safetensors")
    older = msgspec.to_builtins(model) | {"format": 2, "exp_iterations": form.iterations or None}
    del older["softmax"]
    if form.kind == "polynomial":
        older["polynomial"] = True
    (tmp_path / "folded.json").write_text(json.dumps(older))
    assert load_folded(tmp_path)[0] == model
    for damage, message in (
        ({"exp_iterations": "3"}, "expected int"),
        ({"exp_iterations": 9}, "softmax must be exact"),
    ):
        (tmp_path / "folded.json").write_text(json.dumps(older | damage))
        with pytest.raises(UserError, match=f"is damaged: .*{message}"):
            load_folded(tmp_path)
    (tmp_path / "folded.json").write_text(json.dumps(older | {"format": 3}))
    with pytest.raises(UserError, match="is damaged: "):
        load_folded(tmp_path)


def test_all_problems_of_a_description_are_named():
    with pytest.raises(msgspec.ValidationError, match=r"5 heads; .*key_value_heads; .*layers outside"):
        msgspec.json.decode(json.dumps({**FIELDS, "heads": 5, "explicit_ffn": [7]}), type=Description)


# --- Ranges -----------------------------------------------------------------------------------------------------------


def test_the_largest_value_is_named_and_is_the_programs():
    model = describe(temperature=True)
    weights = random_weights(model)
    tokens = [[1, 2, 3, 4], [50, 49]]
    largest = measure_ranges(model, weights, tokens, "power-8", every_row=True).largest
    expected = max(np.abs(run_plain(model, weights, t, 1, "power-8", every_row=True)[1][0]).max() for t in tokens)
    assert largest["head"] == pytest.approx(expected, rel=1e-6)
    assert {"embedding", "layer 0 scores", "layer 2 exp", "centre", "norm"} < largest.keys()
    name = max(largest, key=largest.get)
    settings, (line,) = select_fraction_bits(model, weights, Settings(exact_softmax_as="power-8"), tokens)
    client_checks = dict(largest_logit=largest["head"], blank_logit=weights["head_bias"].max())
    assert settings == Settings(exact_softmax_as="power-8", paired=True, **client_checks)
    assert line == (
        f"18 fraction bits, as given; the calibration text's largest value is {largest[name]:.3g} in {name}, and "
        "6.71e+07 would be too large"
    )


@pytest.mark.parametrize(("fraction_bits", "limit"), [(18, 2.0**26), (22, 2.0**18), (12, 2.0**38)])
def test_refuses_what_the_ring_cannot_hold_with_the_numbers(fraction_bits, limit):
    settings = Settings(fraction_bits=fraction_bits)
    model = describe()
    weights = random_weights(model)
    size = measure_ranges(model, weights, [[1, 2, 3]], "power-8", every_row=True).largest["head"]
    for factor in (0.5, 2.0):
        changed = dict(weights)
        for name in ("head", "head_bias"):
            changed[name] = weights[name] * np.float32(factor * limit / size)
        if factor < 1:
            assert "in head" in select_fraction_bits(model, changed, settings, [[1, 2, 3]])[1][0]
        else:
            match = rf"head reaches {2 * limit:.3g}, .*ring of 64 bits with {fraction_bits} .* below {limit:.3g}"
            with pytest.raises(UserError, match=match.replace("+", r"\+")):
                select_fraction_bits(model, changed, settings, [[1, 2, 3]])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("factor", [1e30, np.inf])
def test_refuses_values_that_are_not_finite(factor):
    model = describe()
    weights = random_weights(model)
    weights["0.qkv"] *= np.float32(factor)
    with pytest.raises(UserError, match="overflow"):
        select_fraction_bits(model, weights, Settings())


def test_looks_at_rare_tokens_with_large_embeddings():
    model = describe()
    weights = random_weights(model)
    sampled = np.random.default_rng(0).integers(0, model.vocab_size, model.positions)
    rare = next(token for token in range(model.vocab_size) if token not in sampled)
    weights["embedding"][rare] *= 1e7
    with pytest.raises(UserError, match="overflow"):
        select_fraction_bits(model, weights, Settings())


def test_norms_of_small_rows_are_refused_with_the_numbers():
    """The mean square of a row in the state's units, far below the last digit's."""
    model = describe(norm="rms", activation="relu", intermediate_size=40, norm_epsilon=1e-8)
    weights = random_weights(model)
    assert problems(measure_ranges(model, weights, [PROMPT], "power-8"), Settings()) == []
    for name in ("embedding", "positions"):
        weights[name] *= np.float32(1e-3)
    ranges = measure_ranges(model, weights, [PROMPT], "power-8")
    state = weights["embedding"][PROMPT] + weights["positions"][: len(PROMPT)]
    smallest = (state**2).mean(axis=1).min() + 1e-8
    assert ranges.smallest_mean_square["layer 0 norm"] == pytest.approx(smallest, rel=1e-4)
    match = rf"mean square of a row in layer 0 norm is {smallest:.3g}, .*at least 9\.54e-07"
    with pytest.raises(UserError, match=match):
        select_fraction_bits(model, weights, Settings(), [PROMPT])


@pytest.mark.parametrize("size", [1e-2, 30.0])
def test_mean_weights_of_the_polynomial_that_cannot_be_divided_by_are_refused(size):
    model = describe(**VARIANTS["polynomial"])
    weights = random_weights(model)
    select_fraction_bits(model, weights, Settings(), [PROMPT])
    weights["1.offset"] *= size
    weights["1.qkv"][:, :24] *= size
    weights["1.qkv_bias"][:24] *= size
    with pytest.raises(UserError, match=r"mean weight of a row in layer 1 normalise is .* between 0.125 and 8192"):
        select_fraction_bits(model, weights, Settings(), [PROMPT])


def test_sums_over_keys_have_to_fit_before_they_are_divided():
    """Their averages would."""
    model = describe(**VARIANTS["powers"])
    weights = random_weights(model)
    ranges = measure_ranges(model, weights, [PROMPT], "power-8")
    assert ranges.largest["layer 1 values"] > 2 * ranges.largest["layer 1 average"]
    factor = 1.2 * largest_product(Settings()) / ranges.largest["layer 1 values"]
    weights["1.qkv"][:, -12:] *= factor  # the columns of v
    weights["1.qkv_bias"][-12:] *= factor
    weights["1.output"] /= factor
    with pytest.raises(UserError, match=r"would overflow: layer 1 values reaches 8.05e\+07, and"):
        select_fraction_bits(model, weights, Settings(), [PROMPT])


def test_values_below_the_resolution_are_refused():
    model = describe()
    weights = random_weights(model)
    weights["1.qkv"][:, -24:] *= np.float32(1e-5)  # the columns of v
    weights["1.qkv_bias"][-24:] = 0
    with pytest.raises(UserError, match=r"typical value in layer 1 (values|normalise) is .*at least 0\.000122"):
        select_fraction_bits(model, weights, Settings(), [PROMPT])


def ranges_of(largest=1.0, typical=1.0, mean_square=1.0):
    return Ranges({"head": largest}, {"norm": mean_square}, {"norm": mean_square}, {"head": typical})


@pytest.mark.parametrize(
    ("ranges", "bits"),
    [
        (ranges_of(), 18),
        (ranges_of(largest=2.0**25.9), 18),  # 2^26 is the limit of 18 bits
        (ranges_of(largest=2.0**26), 17),
        (ranges_of(largest=2.0**33.9), 14),
        (ranges_of(largest=2.0**34), None),
        (ranges_of(typical=2.0**-13), 18),
        (ranges_of(typical=2.0**-13.1), 19),
        (ranges_of(mean_square=2.0**-20), 18),  # of ten digits a row; its square is moved up
        (ranges_of(mean_square=2.0**-20.1), 19),
        (ranges_of(mean_square=2.0**-28.1), None),
        (ranges_of(mean_square=2.0**39.9), 18),  # moved down by the most there is, 24 places
        (ranges_of(mean_square=2.0**40), 20),
        (ranges_of(mean_square=2.0**44), None),
        (ranges_of(largest=2.0**32, mean_square=2.0**-12), 14),
        (ranges_of(largest=2.0**32, mean_square=2.0**-12.1), None),
        (ranges_of(largest=2.0**24, typical=2.0**-14), None),  # below 2^24 with 19 bits
        (ranges_of(largest=2.0**23.9, typical=2.0**-14), 19),
        (ranges_of(largest=np.inf), None),
        (ranges_of(largest=np.nan), None),
    ],
)
def test_the_nearest_safe_fraction_bits_are_found(ranges, bits):
    assert safe_fraction_bits(ranges, Settings()) == bits
    assert safe_fraction_bits(ranges, Settings(fraction_bits=20)) == bits


def with_a_rare_token(model, weights, token, size):
    """Weights whose attention logits are as before, but where `token` is seen: there they are about `size`.

    Its embedding is no larger than the others'.
    """
    random = np.random.default_rng(5)
    direction = random.normal(size=model.hidden_size)
    direction /= np.linalg.norm(direction)
    changed = {name: weight.copy() for name, weight in weights.items()}
    for name in ("embedding", "positions"):
        changed[name] -= np.outer(changed[name] @ direction, direction).astype(np.float32)
    changed["embedding"][token] = np.float32(0.7) * direction * np.sqrt(model.hidden_size) * 0.5
    added = np.zeros_like(changed["0.qkv"])
    added[:, : 2 * model.hidden_size] = np.outer(direction, random.choice([-1, 1], 2 * model.hidden_size))
    changed["0.qkv"] = changed["0.qkv"] + np.float32(size**0.5) * added
    return changed


RARE = dict(vocab_size=512, positions=16, layers=1, norm="none", final_norm="none", centre=False)
RARE_TOKEN = 400


def test_a_token_that_no_calibration_text_holds_is_looked_at():
    model = describe(**RARE)
    weights = with_a_rare_token(model, random_weights(model), RARE_TOKEN, 2.0**25)
    settings, lines = select_fraction_bits(model, weights, SETTINGS, choose=True)
    assert settings.fraction_bits == 18  # nothing is noticed
    sweep = sweep_vocabulary(model, weights, SETTINGS)
    assert sweep.tokens == 512
    assert RARE_TOKEN in sweep.worst
    settings, lines = select_fraction_bits(model, weights, SETTINGS, choose=True, sweep=sweep)
    assert settings.fraction_bits < 18
    assert "because fixed point would overflow: layer 0 " in lines[0]
    assert "512 of 512 tokens were looked at" in lines
    with pytest.raises(UserError, match=r"would overflow: layer 0 .* fraction bits would fit"):
        select_fraction_bits(model, weights, SETTINGS, sweep=sweep)


def test_logits_of_every_token_are_looked_at():
    """A column of the head that is large for one token's state alone."""
    model = describe(**RARE)
    weights = random_weights(model)
    weights["head"][:, 3] *= np.float32(2.0**24)
    name, value = max(sweep_vocabulary(model, weights, SETTINGS).ranges.largest.items(), key=lambda item: item[1])
    assert name == "head"
    states = [run_plain(model, weights, [token], 1, "power-6")[1][0][3] for token in range(0, 512, 64)]
    assert value > np.abs(states).max()


def test_the_look_at_a_vocabulary_is_bounded(monkeypatch):
    """Then tokens with the largest embeddings are looked at, and the log says how many."""
    monkeypatch.setattr(fixed_point, "MAX_SWEEP_OPERATIONS", 0.0)
    model = describe(**RARE)
    weights = random_weights(model)
    weights["embedding"][RARE_TOKEN] *= 10
    sweep = sweep_vocabulary(model, weights, SETTINGS)
    assert sweep.tokens == fixed_point.SWEEP_LENGTH
    assert "128 of 512 tokens were looked at" in select_fraction_bits(model, weights, SETTINGS, sweep=sweep)[1]
    assert RARE_TOKEN in sweep.worst


@pytest.mark.slow
def test_known_answers_in_fixed_point(tmp_path):
    """The same program on a prompt where its numbers wrap: what a check of ranges missed is refused."""
    pytest.importorskip("spu")
    from entropi.private.compute import self_test

    model = describe(**RARE)
    prompt = [5, RARE_TOKEN, 9, 3]
    (tmp_path / "folded.json").write_bytes(msgspec.json.encode(model))
    save_file(random_weights(model), tmp_path / "folded.safetensors")
    good = self_test.compare(self_test.Question(str(tmp_path), SETTINGS, "ref2k", prompt))
    assert good.error < 0.004
    save_file(with_a_rare_token(model, random_weights(model), RARE_TOKEN, 2.0**25), tmp_path / "folded.safetensors")
    bad = self_test.compare(self_test.Question(str(tmp_path), SETTINGS, "ref2k", prompt))
    assert bad.error > 0.3
    other = self_test.compare(self_test.Question(str(tmp_path), SETTINGS, "ref2k", [5, 8, 9, 3]))
    assert other.error < self_test.TOLERANCE  # which is why nobody would notice


@pytest.mark.slow
def test_a_failed_self_test_is_one_line(tmp_path):
    pytest.importorskip("spu")
    from entropi.private.compute.self_test import self_test

    model = describe(**RARE)
    (tmp_path / "folded.json").write_bytes(msgspec.json.encode(model))
    save_file(random_weights(model), tmp_path / "folded.safetensors")
    assert "known answers in fixed point: logits of 4 tokens" in self_test(tmp_path, SETTINGS, "ref2k", [5, 8, 9, 3])
    save_file(with_a_rare_token(model, random_weights(model), RARE_TOKEN, 2.0**25), tmp_path / "folded.safetensors")
    with pytest.raises(UserError, match=r"in fixed point this model's logits are wrong by .* on a known prompt"):
        self_test(tmp_path, SETTINGS, "ref2k", [5, RARE_TOKEN, 9, 3])
    (tmp_path / "folded.safetensors").unlink()
    with pytest.raises(UserError, match="failed to run"):
        self_test(tmp_path, SETTINGS, "ref2k", [1])


def test_canaries():
    pytest.importorskip("spu")
    from types import SimpleNamespace

    from entropi.private.sessions.canary import complaint, make_canary

    model = describe(**{**RARE, "vocab_size": 53})
    weights = random_weights(model)
    weights["head"] *= np.float32(5)
    encoder = SimpleNamespace(encode=lambda text, most: PROMPT)
    expected = run_plain(model, weights, PROMPT, 2, "power-6")
    canary = make_canary("public", encoder, model, weights, SETTINGS, 2)
    count = len(canary.tokens)
    assert canary.tokens == expected[0][:count]

    def complain(tokens, logits, **settings):
        answer = SimpleNamespace(record=SimpleNamespace(new_tokens=tokens), logits=logits)
        return complaint(canary, answer, Settings(**settings))

    assert complain(canary.tokens, expected[1][:count]) is None
    assert complain(canary.tokens, []) is None  # where the server reveals no logits
    assert "token 1 is another" in complain([*canary.tokens[:-1], 52 - canary.tokens[-1]][::-1], [])
    assert "the logit of token 1 is" in complain(canary.tokens, [expected[1][0] + 0.3])
    assert f"token {count} is" in complain(canary.tokens[:-1], [])
    assert complain(canary.tokens, [row + 0.3 for row in expected[1]], logit_bits=0) is None  # half a step may be off
    flat = {**weights, "head": weights["head"] * np.float32(1e-3), "head_bias": weights["head_bias"] * 0}
    with pytest.raises(UserError, match="choose another text"):
        make_canary("public", encoder, model, flat, SETTINGS, 9)
    with pytest.raises(UserError, match="at most 300"):
        make_canary("x" * 301, encoder, model, weights, SETTINGS, 9)


def enlarged_head(model, weights, size):
    """Weights whose logits on PROMPT reach `size`."""
    reach = measure_ranges(model, weights, [PROMPT], "power-6", every_row=True).largest["head"]
    return {**weights, **{name: weights[name] * np.float32(size / reach) for name in ("head", "head_bias")}}


def test_fraction_bits_are_chosen_with_room_to_spare_where_there_is():
    model = describe()
    weights = random_weights(model)

    def chosen(weights):
        settings, (line, *_) = select_fraction_bits(model, weights, SETTINGS, [PROMPT], choose=True)
        assert line.startswith(f"{settings.fraction_bits} fraction bits, ")
        return settings.fraction_bits, line

    assert chosen(weights)[0] == 18
    assert chosen(enlarged_head(model, weights, 2.0**23.9))[0] == 18
    bits, line = chosen(enlarged_head(model, weights, 2.0**25))
    assert bits == 17
    assert "the nearest to 18, because fixed point could overflow on other text: head reaches 3.36e+07" in line
    bits, line = chosen(enlarged_head(model, weights, 2.0**29))
    assert bits == 15
    assert "because fixed point would overflow: head reaches 5.37e+08" in line
    # Without room to spare nothing is left to choose but what just holds.
    assert chosen(enlarged_head(model, weights, 2.0**33))[0] == 14
    small = dict(weights)
    small["1.qkv"], small["1.qkv_bias"] = weights["1.qkv"].copy(), weights["1.qkv_bias"].copy()
    small["1.qkv"][:, -24:] *= np.float32(0.8e-4)  # the columns of v
    small["1.qkv_bias"][-24:] = 0
    bits, line = chosen(small)
    assert bits == 19
    assert "because fixed point would lose what is small: the typical value in layer 1" in line
    with pytest.raises(
        UserError, match=r"head reaches 5.5e\+11, .*with 14 .*with 22 .*no number .* 14 to 22, would do"
    ):
        chosen(enlarged_head(model, weights, 2.0**39))


def test_unsafe_fraction_bits_are_refused_and_safe_ones_named():
    model = describe()
    weights = enlarged_head(model, random_weights(model), 2.0**29)
    with pytest.raises(UserError, match=r"would overflow: head reaches 5\.37e\+08, .*; 16 fraction bits would fit"):
        select_fraction_bits(model, weights, SETTINGS, [PROMPT])
    settings, _ = select_fraction_bits(model, weights, Settings(exact_softmax_as="power-6", fraction_bits=16), [PROMPT])
    assert settings.fraction_bits == 16


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["ref2k", pytest.param("cheetah", marks=pytest.mark.two_party)])
def test_models_that_need_fewer_fraction_bits_are_computed_right(protocol):
    """Logits of attention far beyond what 18 bits hold; with those, the answer is nonsense: the check has a reason."""
    model = describe(**{**VARIANTS["llama"], "layers": 2})
    weights = random_weights(model)
    weights["1.qkv"][:, : -2 * 6] *= np.float32(2.0**14)  # queries and keys; the columns of two heads' v stay
    settings, _ = select_fraction_bits(model, weights, SETTINGS, choose=True)
    assert settings.fraction_bits == FEWER_BITS
    generated, expected = run_plain(model, weights, PROMPT, 2, "power-6")
    found, _ = simulate(protocol, model, weights, [PROMPT, generated[:1]], settings)
    for got, plain in zip(found, expected):
        np.testing.assert_allclose(got["logits"][0], plain, atol=0.01)
    if protocol == "ref2k":
        (nonsense,), _ = simulate(protocol, model, weights, [PROMPT], SETTINGS)
        assert np.abs(nonsense["logits"][0] - expected[0]).max() > 0.1


@pytest.mark.parametrize(("mean_square", "moved"), [(2.0**-14, 1), (2.0**-5, 0), (0.98 * 2.0**16, -1), (2.0**26, -1)])
def test_norms_of_rows_of_any_size_are_computed_right(mean_square, moved):
    """From 2^17 on the engine's inverse root is 0 with 18 fraction bits, and below 2^-10 it has few digits."""
    model = describe(norm="rms", layers=1, activation="relu", intermediate_size=40)
    weights = random_weights(model)
    weights["embedding"][PROMPT] /= np.sqrt(np.mean(np.square(weights["embedding"][PROMPT]), axis=1, keepdims=True))
    for name in ("embedding", "positions"):
        weights[name] *= np.float32(np.sqrt(mean_square) if name == "embedding" else 0)
    for name in ("0.output", "0.down", "0.output_bias", "0.down_bias"):
        weights[name] *= np.float32(np.sqrt(mean_square))
    ranges = measure_ranges(model, weights, [PROMPT], "power-6")
    assert ranges.largest_mean_square["layer 0 norm"] >= mean_square * 0.999
    settings = select_fraction_bits(model, weights, SETTINGS, [PROMPT], choose=True)[0]
    assert settings.fraction_bits == 18
    assert np.sign((settings.norm_shifts or (0,))[0]) == moved
    _, (expected,) = run_plain(model, weights, PROMPT, 1, "power-6")
    (found,), _ = simulate("ref2k", model, weights, [PROMPT], settings)
    np.testing.assert_allclose(found["logits"][0], expected, atol=0.02)
    if mean_square > 2.0**17:
        (nonsense,), _ = simulate("ref2k", model, weights, [PROMPT], SETTINGS)
        assert np.abs(nonsense["logits"][0] - expected).max() > 0.1


@pytest.mark.parametrize(
    ("chooses", "prepared", "expected"), [(False, True, False), (True, True, True), (False, False, True)]
)
def test_a_prepared_session_sets_up_for_choices_alone(chooses, prepared, expected):
    """By the one rule that the parties, the client's progress and the prediction share."""
    assert warms_up(chooses, prepared=prepared) == expected
