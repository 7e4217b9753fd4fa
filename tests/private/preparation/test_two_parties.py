"""Two processes under CHEETAH: products prepared exactly, passes with them right, and nothing but noise on the wire."""

import numpy as np
import pytest

pytest.importorskip("spu")

from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation.material import BITS, KEPT, SIGNS, TRUNCATE, WINNERS, array_name, gates_of
from entropi.private.preparation.products import multiply
from entropi.private.preparation.ring import encode
from entropi.private.preparation.truncation import unpacked
from masked_passes import chi_square, products_of_masks, smallest_gap
from prepared_parties import AGAIN, CASES, PASSES, Case, play

pytestmark = [pytest.mark.two_party, pytest.mark.slow]

NAMES = [*CASES, AGAIN]
TOLERANCE = 0.004  # of logits, as of passes without preparation
ENOUGH = 400  # chi-square of 255 degrees of freedom is larger one time in 10^8
# Equal values of two sessions differ by rounding, some 2^8 last digits. Between any two of 10^4 numbers from all of the
# ring is a gap so small one time in a million.
CLOSE = 2**16


@pytest.fixture(scope="session")
def played(tmp_path_factory):
    """What the server and the client have of every case."""
    folder = tmp_path_factory.mktemp("prepared")
    play(folder, NAMES)
    return {name: [dict(np.load(folder / f"{name}-{rank}.npz")) for rank in (SERVER, CLIENT)] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_unprepared_programs(played, name):
    for number, expected in enumerate(Case(name).plain_logits()):
        np.testing.assert_allclose(played[name][CLIENT][f"logits {number}"], expected, atol=TOLERANCE)
    assert f"logits {len(PASSES) - 1}" in played[name][CLIENT]
    assert not [key for key in played[name][SERVER] if key.startswith("logits")]


@pytest.mark.parametrize("name", NAMES)
def test_products_are_exact(played, name):
    """To the last digit or, where the engine may be wrong by one, to that; a square has twice its error."""
    case, wrong, count = Case(name), 0, 0
    for need in case.needs:
        if need.kind in (TRUNCATE, SIGNS, WINNERS, BITS, KEPT):
            continue

        def whole(which, need=need):
            parts = [played[name][rank].get(f"material {array_name(need.name, which)}") for rank in (SERVER, CLIENT)]
            return sum((part for part in parts if part is not None), start=np.uint64(0))

        a, product = whole("a"), whole("c")
        b = a if need.masking == "self" else whole("b")
        if need.matrix:
            b = encode(case.weights[need.matrix], case.settings.fraction_bits).astype(np.int64).view(np.uint64)
        assert product.shape == need.result
        error = np.abs((product - multiply(need.kind, a, b)).view(np.int64))
        most = need.shapes[0][-1] if need.kind not in ("times", "square") else 1
        assert error.max() <= 2 * most
        wrong, count = wrong + (error > 0).sum(), count + error.size
    assert wrong < 0.01 * count


@pytest.mark.parametrize("name", NAMES)
def test_products_of_bits_are_exact(played, name):
    case = Case(name)
    (count,) = [need.rows for need in case.needs if need.kind == TRUNCATE]
    server, client = (truncations(party, count) for party in played[name])
    bits = case.settings.fraction_bits
    np.testing.assert_array_equal((server.products + client.products) % 2**bits, server.bits & client.bits)
    for party in (server, client):
        assert party.products.max() < 2**bits
        assert abs(party.bits.mean() - 0.5) < 5 * 0.5 / count**0.5
        for place in range(bits):
            assert abs((party.products >> np.uint32(place) & np.uint32(1)).mean() - 0.5) < 5 * 0.5 / count**0.5


@pytest.mark.parametrize("name", NAMES)
def test_random_bits_of_comparisons_are_exact(played, name):
    kinds = set()
    for need in Case(name).needs:
        parts = {
            which: [party.get(f"material {array_name(need.name, which)}") for party in played[name]] for which in "abc"
        }
        if need.kind in (SIGNS, WINNERS):
            masks, products = (np.bitwise_xor(*parts[which]) for which in "ac")
            assert (masks.shape, products.shape) == (need.shapes[0], need.result)
            np.testing.assert_array_equal(products, products_of_masks(masks, gates_of(need)))
        elif need.kind in (BITS, KEPT):
            bits = np.add(*parts["b"])
            assert set(np.unique(bits)) == {0, 1}
            assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5
            if need.kind == KEPT:
                np.testing.assert_array_equal(np.add(*parts["c"]), bits * np.add(*parts["a"]))
        kinds.add(need.kind)
    assert kinds >= ({SIGNS, BITS, KEPT} if "layer norm" in name or "every" in name else {SIGNS})


def truncations(party, count):
    return unpacked(*(party[f"material {array_name(TRUNCATE, which)}"] for which in ("a", "c")), count)


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_material_are_uniform(played, name):
    """Of each party's masks and products by itself, also of what is the product with a matrix of small numbers."""
    for of_party in played[name]:
        names = [key for key in of_party if key.startswith("material") and f" {TRUNCATE} " not in key]
        numbers = np.concatenate([of_party[key].reshape(-1) for key in names])
        assert len(np.unique(numbers)) == len(numbers)
        for byte in range(8):
            assert chi_square((numbers >> np.uint64(8 * byte)).astype(np.uint8)) < ENOUGH


@pytest.mark.parametrize("name", NAMES)
def test_what_is_sent_and_opened_is_uniform(played, name):
    server, client = played[name]
    for party in (server, client):
        assert abs(party["bits"].mean() - 0.5) < 5 * 0.5 / len(party["bits"]) ** 0.5
    for numbers in (server["sent"], client["sent"], server["opened"]):
        assert len(numbers) > 1000
        for byte in range(8):
            assert chi_square((numbers >> np.uint64(8 * byte)).astype(np.uint8)) < ENOUGH


def test_no_mask_hides_two_values(played):
    """In passes that see a token again, and between two sessions of the same tokens with material of their own."""
    first = played[AGAIN.split(",")[0]][SERVER]["opened"]
    second = played[AGAIN][SERVER]["opened"]
    assert len(first) == len(second)
    assert smallest_gap([first, second]) > CLOSE
    assert smallest_gap([first, second, second[:1] + np.uint64(300)]) < CLOSE  # so it would be seen


def test_the_server_gets_no_mask_of_the_client(played):
    for parties in played.values():
        for rank in (SERVER, CLIENT):
            mine = [array.reshape(-1) for key, array in parties[rank].items() if key.startswith("material")]
            assert not np.isin(parties[rank]["sent"], np.concatenate(mine)).any()
