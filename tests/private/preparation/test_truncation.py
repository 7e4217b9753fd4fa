"""Truncating products that come back with twice the fraction bits, by the engine."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

pytest.importorskip("spu")

from entropi.private.compute.engine import Simulation
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.preparation.cutting import truncate


def test_values_are_truncated_as_far_as_the_ring_holds_them():
    """Up to 2^25, as after any other product; several at once exchange no more messages than one."""
    settings = Settings()
    engine = Simulation("cheetah", settings)
    sizes = np.array([0.001, 0.37, 1, 100, 600, 1_000, 2_000, 8_000, 1e6, 2.0**25])
    expected = {"few": np.concatenate([sizes, -sizes]), "more": np.linspace(-5_000, 5_000, 60).reshape(3, 4, 5)}
    for name, values in expected.items():
        raw = values * 2.0**settings.fraction_bits  # as a real number: what twice the fraction bits stand for
        engine.hold(f"{name} 0", 0.25 * raw, SERVER)
        engine.hold(f"{name} 1", 0.75 * raw, CLIENT)
        engine.run(Stage("share", -1, lambda x, y: x + y, (f"{name} 0", f"{name} 1"), (name,)))

    function = partial(truncate, bits=settings.fraction_bits)
    engine.run(Stage("one", -1, function, ("few",), ("alone",)))  # sets up
    one = engine.run(Stage("one", -1, function, ("few",), ("alone",)))
    two = engine.run(Stage("two", -1, function, ("few", "more"), ("first", "second")))
    assert two.messages == one.messages
    for name, result in (("few", "alone"), ("few", "first"), ("more", "second")):
        found = engine.reveal(result)
        np.testing.assert_allclose(found, expected[name], rtol=2e-7, atol=2.0**-16)
