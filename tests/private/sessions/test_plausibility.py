"""What a client notices of values that left the range of fixed-point numbers."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("jax")

from entropi.errors import UserError
from entropi.private.compute.fixed_point import select_fraction_bits
from entropi.private.compute.self_test import logits_of_pass
from entropi.private.compute.settings import SERVER, Settings
from entropi.private.sessions.client_session import ClientSession
from entropi.private.sessions.generation import Generation, Watcher
from entropi.private.sessions.plausibility import implausible
from entropi.private.sessions.sampling import GREEDY
from entropi.private.wire.messages import Revealed
from private_reference import describe, random_weights

PROMPT = [3, 17, 8, 40, 40, 2]


def engine_logits(model, weights, settings):
    pytest.importorskip("spu")
    from entropi.private.compute.engine import Simulation

    engine = Simulation("ref2k", settings)
    for name, weight in weights.items():
        engine.hold(name, weight, SERVER)
    return logits_of_pass(engine, model, settings, weights["embedding"], PROMPT, 0, every_row=False)[0]


@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("size", [1.0, 2.0**12, 2.0**24])
def test_values_that_left_the_range_are_noticed(size, norm):
    """An unusual token, of which nothing was known when the settings were chosen: its row is this much larger."""
    parts = dict(norm="rms", activation="relu", intermediate_size=40, centre=False)
    model = describe(**parts) if norm == "rms" else describe(final_norm="none", centre=False)
    weights = random_weights(model)
    settings, _ = select_fraction_bits(model, weights, Settings(embedding="public"), [PROMPT])
    weights["embedding"][PROMPT[-1]] *= np.float32(size)
    found = implausible(engine_logits(model, weights, settings), settings)
    if size == 1:
        assert found is None
    else:
        assert "logits" in found


def test_what_is_too_large_is_told_with_the_numbers():
    settings = Settings(largest_logit=10.0)
    assert implausible(np.array([40.9, -3.0]), settings) is None
    assert implausible(np.array([3.0, -41.1]), settings) == "logits reach 41.1, and this model's are below 41"
    assert "reach nan" in implausible(np.array([1.0, np.nan]), settings)
    assert implausible(np.array([1e9, 1.0]), Settings()) is None


def test_logits_of_a_row_of_zeros_are_noticed_where_none_are_rounded():
    bias = np.linspace(-1, 0.25, 9)
    assert implausible(bias, Settings(blank_logit=0.25)) == "the logits are those of a row of zeros"
    assert implausible(bias[-3:], Settings(output="top_k", blank_logit=0.25)) is not None
    assert implausible(bias + 1e-3, Settings(blank_logit=0.25)) is None
    assert implausible(bias, Settings(blank_logit=0.25, logit_bits=2)) is None


def test_a_client_refuses_such_a_token():
    settings = Settings(largest_logit=10.0)
    generation = Generation("a", 3, GREEDY, 0, Watcher())
    session = ClientSession(SimpleNamespace(name="the server"), None, None, generation)
    session.welcome = SimpleNamespace(description=describe(), settings=settings)
    session._take(Revealed(bytes=8, logits=[1.0, 2.0, 0.5]), settings)
    with pytest.raises(UserError, match="token 2 from the server would be nonsense: logits reach 5e\\+09"):
        session._take(Revealed(bytes=8, logits=[1.0, 5e9, 0.5]), settings)
    assert generation.new_tokens == [1]
