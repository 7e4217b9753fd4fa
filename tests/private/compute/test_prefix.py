"""A public prefix: its keys and values are the server's constants, and all else is as if it had been in the prompt."""

import json
import sys
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("spu")
from entropi.costs.calibration import shipped
from entropi.costs.network import parse_network
from entropi.costs.prediction import CostModel, Options, Predictor
from entropi.errors import UserError
from entropi.private.compute.engine import Simulation
from entropi.private.compute.fixed_point import measure_ranges, select_fraction_bits, sweep_vocabulary
from entropi.private.compute.prefix import names, shape, with_prefix
from entropi.private.compute.program import run_plain, stages_of_pass, warm_up
from entropi.private.compute.settings import CLIENT, SERVER, Settings, trust
from entropi.private.sessions import client, findings
from entropi.private.sessions.generation import Watcher
from entropi.private.sessions.readiness import check_prefix
from entropi.private.sessions.tokenization import public_ids
from private_reference import VARIANTS, describe, random_weights
from serving import POSITIONS, PROMPT, TOLERANCE, Server, plain_logits, run_cli

pytest_plugins = ["serving"]  # its fixtures

PUBLIC, PRIVATE = [7, 3, 11, 2], [5, 9, 1]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_prefix_and_a_prompt_are_one_prompt(name):
    """For the exact functions: keys and values do not depend on who computed them."""
    model = describe(**VARIANTS[name])
    weights = random_weights(model)
    whole = run_plain(model, weights, PUBLIC + PRIVATE, 2, "quartic", exact=True)
    parted = run_plain(model, with_prefix(model, weights, PUBLIC), PRIVATE, 2, "quartic", exact=True)
    assert parted[0] == whole[0]
    for one, other in zip(parted[1], whole[1]):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_no_prefix_changes_nothing():
    model = describe()
    weights = random_weights(model)
    assert with_prefix(model, weights, []).keys() == weights.keys()


def test_keys_and_values_have_their_names_and_shapes():
    model = describe(**VARIANTS["gpt-neox"])
    found = with_prefix(model, random_weights(model), PUBLIC)
    assert {name: found[name].shape for name in names(model)} == dict.fromkeys(names(model), shape(model, len(PUBLIC)))


def test_what_a_prefix_reaches_is_not_looked_at():
    """The massive activations of pretrained models sit in their first token."""
    model = describe(norm="rms", activation="relu", intermediate_size=40)
    weights = random_weights(model)
    weights["embedding"][PUBLIC[0]] *= 5e5  # which no fixed point holds beside the other rows
    settings = Settings(embedding="public")
    with pytest.raises(UserError, match="fixed point would"):
        select_fraction_bits(model, weights, settings, [PUBLIC + PRIVATE])
    parted = with_prefix(model, weights, PUBLIC)
    select_fraction_bits(model, parted, settings, [PRIVATE])
    largest = [max(measure_ranges(model, w, [t], "quartic").largest.values()) for w, t in ((parted, PRIVATE),)]
    assert largest[0] < 1e4
    assert sweep_vocabulary(model, parted, settings).tokens == model.vocab_size


@pytest.mark.parametrize("embedding", ["public", "private"])
def test_fixed_point_computes_it(embedding):
    model = describe(**VARIANTS["gpt-neox"])
    weights = random_weights(model)
    settings = Settings(embedding=embedding)
    found, _ = _session("ref2k", model, with_prefix(model, weights, PUBLIC), settings)
    expected = run_plain(model, weights, PUBLIC + PRIVATE, 1, "quartic", exact=True)[1][-1]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def _session(protocol, model, weights, settings):
    """Logits after `PRIVATE`, and the bytes of every operation."""
    from entropi.private.compute.embedding import one_hot

    engine = Simulation(protocol, settings)
    for name, weight in weights.items():
        if name != "embedding" or settings.embedding == "private":
            engine.hold(name, weight, SERVER)
    if settings.embedding == "public":
        engine.hold("embedded", weights["embedding"][PRIVATE], CLIENT)
    else:
        engine.hold("tokens", one_hot(PRIVATE, model.vocab_size, settings.paired, settings.fraction_bits), CLIENT)
    past = len(PUBLIC) if "0.k" in weights else 0
    for name, (dimensions, owner) in warm_up()[1].items():
        engine.hold(name, np.zeros(dimensions), SERVER if owner == "server" else CLIENT)
    sizes: Counter[str] = Counter()
    for stage in [warm_up()[0], *stages_of_pass(model, settings, len(PRIVATE), past)]:
        sizes[stage.name] += engine.run(stage).bytes
    return engine.reveal("logits")[-1], sizes


@pytest.mark.slow
def test_its_price_is_predicted():
    """By the meter, both parties; and a prefix costs less than as many tokens of the prompt."""
    model = describe(norm="rms", activation="relu", intermediate_size=96, positions=64)
    weights, settings = random_weights(model), Settings(embedding="public")
    _, sizes = _session("cheetah", model, with_prefix(model, weights, PUBLIC), settings)

    calibration = shipped("cheetah")
    options = Options(embedding="public", fraction_bits=calibration.fraction_bits, prefix_tokens=len(PUBLIC))
    costs = CostModel(calibration, parse_network("lan"), options)
    predictor = Predictor(model, costs)
    predictor.set_up()
    predicted = predictor.run(len(PRIVATE)).by_operation()
    for name in ("qkv", "scores", "values"):  # what attention to a prefix adds to; nothing in them is prepared ahead
        assert predicted[name].bytes == pytest.approx(sizes[name], rel=0.03)
    record = costs.predict(model, 16)
    assert (record.prefix_tokens, record.tokens_in_words) == (4, "16 tokens after 4 public ones")
    whole = CostModel(calibration, parse_network("lan"), Options(embedding="public")).predict(model, 20)
    assert record.prompt.bytes < whole.prompt.bytes


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        (list(range(33)), "the prefix has 33 tokens, which leaves no room for a prompt in 16"),
        (list(range(16)), "the prefix has 16 tokens, which leaves no room for a prompt in 16"),
        ([1, 99], "the prefix has a token 99, and the model 53 tokens"),
    ],
)
def test_an_impossible_prefix_is_refused(prefix, says):
    with pytest.raises(UserError, match=says):
        check_prefix(prefix, describe(positions=16, vocab_size=53))


def test_who_learns_what_names_the_prefix():
    assert trust(Settings(), 35).endswith("; every prompt continues 35 public tokens")
    assert "public" not in trust(Settings())


def test_findings_are_of_one_prefix(folded):
    keys = {findings.key_of(folded, Settings(), True, prefix) for prefix in ([], [1], [1, 2])}
    assert len(keys) == 3


def test_special_tokens_of_a_prefix_are_tokens(model):
    tokenizer = (model[0] / "tokenizer.json").read_text()
    special = next(token["content"] for token in json.loads(tokenizer)["added_tokens"] if token["special"])
    ids = public_ids(tokenizer, f"{special}the garden")
    assert ids[0] == model[2].token_to_id(special)
    assert model[2].decode(ids[1:]) == "the garden"
    with pytest.raises(UserError, match="the prefix is empty"):
        public_ids(tokenizer, "")


@pytest.mark.two_party
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_server_with_a_prefix(model, folded, scratch, capfd, tmp_path):
    """Two processes: the answer is that to the whole text, the client is shown the prefix and may refuse it."""
    public = tmp_path / "prefix.txt"
    public.write_text("the secret garden lies ")
    server = Server(folded, scratch / "server.log", "--prefix-file", public, "--self-test", "ref2k")
    try:
        said: list[str] = []
        answer = client.ask(server.address(), PROMPT, 3, Watcher(status=said.append))
        prefix, prompt = (model[2].encode(text).ids for text in (public.read_text(), PROMPT))
        assert (answer.record.prefix_tokens, answer.record.prompt_tokens) == (len(prefix), prompt)
        assert answer.record.trust.endswith(f"; every prompt continues {len(prefix)} public tokens")
        what = (
            f"{server.address()} puts a public text of {len(prefix)} tokens before every prompt: {public.read_text()!r}"
        )
        assert " proposes " in said[0]
        assert said[1:] == [what]
        for number, logits in enumerate(answer.logits):
            expected = plain_logits(model[1], prefix + prompt + answer.record.new_tokens[:number])
            np.testing.assert_allclose(logits, expected, atol=TOLERANCE)

        words = ["ask", PROMPT, "--server", server.address()]
        assert run_cli(capfd, *words, "--no-prefix") == (2, f"entropi: {what}")
        left = POSITIONS + 1 - len(prefix) - len(prompt)
        status, line = run_cli(capfd, *words, "--max-new-tokens", left + 1)
        assert status == 2
        assert f"at most {POSITIONS + 1 - len(prefix)} tokens" in line
    finally:
        server.process.kill()
        server.process.wait()
