"""The forms of the softmax: their texts, what is refused, and what older settings mean."""

import pytest
import torch

from entropi import EntropiConfig
from entropi.entropy.attention import entropy_attention
from entropi.errors import UserError
from entropi.softmax import (
    EXACT,
    KINDS,
    USUAL_FOR_EXACT,
    SoftmaxForm,
    from_former,
    parse_for_exact,
    parse_of_attention,
    parse_of_model,
)

POSSIBLE = (
    "softmax must be exact, quartic, power-1 to power-16 or polynomial-1 to polynomial-8 with or without /keys or a "
    "number such as /128"
)
DIVISORS = {name: ("sum", "keys", 7) if kind.public_divisors else ("sum",) for name, kind in KINDS.items()}
FORMS = [
    SoftmaxForm(name, iterations, divisor)
    for name, kind in KINDS.items()
    for divisor in DIVISORS[name]
    for iterations in range(bool(kind.most), kind.most + 1)
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_text_says_its_form(form):
    assert SoftmaxForm.parse(str(form)) == form
    assert SoftmaxForm.parse(form) is form
    assert parse_of_model("exact") == EXACT


def test_texts_are_those_of_files():
    assert [str(SoftmaxForm()), str(SoftmaxForm("power", 2)), str(SoftmaxForm("polynomial", 1))] == [
        "exact",
        "power-2",
        "polynomial-1",
    ]
    assert str(SoftmaxForm("polynomial", 2, "keys")) == "polynomial-2/keys"
    assert str(SoftmaxForm("polynomial", 2, 128)) == "polynomial-2/128"
    assert {str(SoftmaxForm("polynomial", 2, divisor).over_sum) for divisor in ("keys", 128)} == {"polynomial-2"}
    assert len({str(form) for form in FORMS}) == len(FORMS) == 1 + 1 + 16 + 8 + 8 + 8


@pytest.mark.parametrize(
    "text",
    [
        "power-02",
        "power-2 ",
        "Power-2",
        "power--2",
        "power-1e1",
        "power-٣",
        "exact-0",
        "\n",
        "polynomial-1/sum",
        "/keys",
        "polynomial-1/",
        "polynomial-1/0",
        "polynomial-1/07",
        "polynomial-1/1000000",
        "polynomial-1/-7",
        "polynomial-1/7.5",
        "polynomial-1/keys/7",
        "power-1/7",
        "exact/7",
    ],
)
def test_a_form_has_one_text(text):
    with pytest.raises(UserError, match=POSSIBLE):
        SoftmaxForm.parse(text)


@pytest.mark.parametrize(
    "form",
    [
        *(("exact", 1), ("power", 0), ("power", 17), ("polynomial", 9), ("power", 2.0), ("power", True), ("cubic", 2)),
        *(("exact", 0, "keys"), ("power", 2, "keys"), ("polynomial", 2, "values")),
        *(("polynomial", 2, 0), ("polynomial", 2, 1_000_000), ("polynomial", 2, True), ("polynomial", 2, "7")),
        *(("polynomial", 2, 7.0), ("power", 2, 7)),
    ],
)
def test_there_are_no_other_forms(form):
    with pytest.raises(UserError, match=POSSIBLE):
        SoftmaxForm(*form)


def test_refusals_are_one_short_line():
    with pytest.raises(UserError) as caught:
        SoftmaxForm.parse("x\n" * 10_000)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_models_and_servers_have_fewer():
    assert [parse_of_model(f"{kind}-8").kind for kind in ("power", "polynomial")] == ["power", "polynomial"]
    with pytest.raises(UserError, match=r"softmax must be exact, power-1 to power-8 or .*, got 'power-9'"):
        parse_of_model("power-9")
    assert str(parse_for_exact(USUAL_FOR_EXACT)) == "quartic"
    with pytest.raises(UserError, match=r"softmax must be exact, power-1 to power-8 or .*, got 'quartic'"):
        parse_of_model("quartic")
    with pytest.raises(UserError, match=r"softmax must be exact, power-1 to power-16 or .*, got 'quartic'"):
        parse_of_attention("quartic")
    for text in ("exact", "power-9", "polynomial-1", "polynomial-1/keys", "polynomial-1/7"):
        with pytest.raises(UserError, match=f"--softmax must be quartic or power-1 to power-8, got '{text}'"):
            parse_for_exact(text, "--softmax")


def test_words():
    assert [SoftmaxForm.parse(text).words for text in ("exact", "power-8", "polynomial-1")] == [
        "exact softmax",
        "softmax kernel t=8",
        "polynomial kernel t=1",
    ]
    assert [SoftmaxForm.parse(text).label for text in ("exact", "power-8", "polynomial-1")] == [
        "exact",
        "t=8",
        "polynomial t=1",
    ]
    over_keys = SoftmaxForm.parse("polynomial-1/keys")
    assert over_keys.words == "polynomial kernel t=1 over the number of keys"
    assert over_keys.label == "polynomial t=1/keys"
    assert over_keys.formula == "(1 + x/2)^2 of the logit itself, nothing compared, over the number of keys"
    over_a_number = SoftmaxForm.parse("polynomial-1/128")
    assert over_a_number.words == "polynomial kernel t=1 over 128"
    assert over_a_number.label == "polynomial t=1/128"
    assert over_a_number.formula == "(1 + x/2)^2 of the logit itself, nothing compared, over 128"
    assert [SoftmaxForm.parse(text).formula for text in ("power-3", "polynomial-1")] == [
        "(1 + x/8)^8 of the distance to the row's largest logit",
        "(1 + x/2)^2 of the logit itself, nothing compared",
    ]


@pytest.mark.parametrize(
    ("older", "now"),
    [
        ({}, {}),
        ({"softmax": "power-2"}, {"softmax": "power-2"}),
        ({"exp_iterations": None}, {"softmax": "exact"}),
        ({"exp_iterations": 0, "polynomial": False}, {"softmax": "exact"}),
        ({"exp_iterations": 3, "steps": 1}, {"softmax": "power-3", "steps": 1}),
        ({"exp_iterations": 2, "polynomial": True}, {"softmax": "polynomial-2"}),
    ],
)
def test_what_older_settings_mean(older, now):
    given = dict(older)
    assert from_former(older) == now
    assert older == given


@pytest.mark.parametrize(
    ("older", "message"),
    [
        ({"polynomial": True}, "polynomial needs exp_iterations"),
        ({"exp_iterations": "3"}, "exp_iterations is '3', expected int"),
        ({"exp_iterations": True}, "exp_iterations is True, expected int"),
        ({"exp_iterations": 1, "polynomial": "yes"}, "polynomial is 'yes', expected bool"),
        ({"softmax": "exact", "exp_iterations": 1}, "softmax has taken the place of exp_iterations: leave"),
    ],
)
def test_older_settings_that_mean_nothing(older, message):
    with pytest.raises(UserError, match=message):
        from_former(older)


def test_configurations_of_older_models_are_read():
    assert EntropiConfig(exp_iterations=None, polynomial=False).softmax == "exact"
    assert EntropiConfig.from_dict({"exp_iterations": 3, "polynomial": False}).softmax == "power-3"
    config = EntropiConfig.from_dict({"model_type": "entropi", "exp_iterations": 1, "polynomial": True})
    assert config.softmax == "polynomial-1"
    assert config.softmax_form == SoftmaxForm("polynomial", 1)
    written = config.to_dict()
    assert written["softmax"] == "polynomial-1"
    assert not {"exp_iterations", "polynomial"} & set(written)
    assert EntropiConfig.from_dict(written).softmax == "polynomial-1"
    with pytest.raises(UserError, match=r"softmax must be .*, got 'power-40'"):
        EntropiConfig(exp_iterations=40)
    with pytest.raises(UserError, match="softmax has taken the place of exp_iterations"):
        EntropiConfig(exp_iterations=3, softmax="power-2")


FORMULAS = {
    "exact": lambda s, t: s.exp(),
    "power": lambda s, t: (1 + (s - s.amax(-1, keepdim=True)).clamp(min=-0.9 * 2**t) / 2**t) ** (2**t),
    "polynomial": lambda s, t: (1 + s / 2**t) ** (2**t),
}


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize(
    ("kind", "divisor"), [(name, over) for name, known in KINDS.items() if known.trained for over in DIVISORS[name]]
)
def test_every_kind_has_its_formula(kind, divisor, implementation):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    form = SoftmaxForm(kind, min(3, KINDS[kind].most), divisor)
    found, _ = entropy_attention(
        query, key, value, is_causal=False, scale=2.0, softmax=form, implementation=implementation
    )
    weights = FORMULAS[kind](2.0 * query @ key.transpose(-1, -2), form.iterations)
    divided_by = {"sum": weights.sum(-1, keepdim=True), "keys": 5, 7: 7}[divisor]
    torch.testing.assert_close(found, weights / divided_by @ value)
