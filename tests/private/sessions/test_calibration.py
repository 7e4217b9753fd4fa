"""The text on which a model's values are looked at, as its tokenizer cuts it."""

from functools import partial

import msgspec
import numpy as np
import pytest

pytest.importorskip("jax")

from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from entropi.errors import UserError
from entropi.private.compute.description import Description
from entropi.private.compute.fixed_point import CALIBRATION_LENGTH, measure_ranges, problems, select_fraction_bits
from entropi.private.compute.prefix import with_prefix
from entropi.private.compute.settings import Settings
from entropi.private.sessions.calibration import PLAIN_LENGTH, calibration_sequences, usual_text
from entropi.private.sessions.readiness import verified_settings
from private_reference import describe, random_weights

SPECIAL = ["<begin>", "<turn>"]


@pytest.fixture(scope="module")
def tokenizer():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=SPECIAL, initial_alphabet=alphabet)
    trained.train_from_iterator([usual_text()], trainer)
    trained.decoder = decoders.ByteLevel()
    return trained


def begun(tokenizer):
    changed = Tokenizer.from_str(tokenizer.to_str())
    changed.post_processor = processors.TemplateProcessing("<begin> $A", special_tokens=[("<begin>", 0)])
    return changed


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROPI_CACHE", str(tmp_path / "cache"))


def model_of(positions):
    model = describe(vocab_size=270, positions=positions, position_embedding="rotary", rotary_dimensions=6)
    return model, random_weights(model)


def test_special_tokens_stand_between_the_paragraphs(tokenizer):
    model, weights = model_of(4096)
    sequences = calibration_sequences(tokenizer.to_str(), model, weights)
    *text, largest = sequences
    ids = [token for part in text for token in part]
    assert all(len(one) <= CALIBRATION_LENGTH for one in sequences)
    assert largest[0] == np.abs(weights["embedding"]).max(axis=1).argmax()
    plain = tokenizer.decode([token for token in ids if token > 1], skip_special_tokens=False)
    assert usual_text().replace("\n\n", "").startswith(plain[:1000])
    places = [place for place, token in enumerate(ids) if token < 2]
    assert [ids[place] for place in places] == [n % 2 for n in range(len(places))]
    assert places[0] == len(tokenizer.encode(usual_text().split("\n\n")[0]).ids)


def test_the_tokenizers_beginning_stands_in_front_and_once_not(tokenizer):
    model, weights = model_of(4096)
    first, *_, plain = calibration_sequences(begun(tokenizer).to_str(), model, weights)
    assert first[0] == 0
    assert plain == first[1 : PLAIN_LENGTH + 1]
    behind = calibration_sequences(begun(tokenizer).to_str(), model, with_prefix(model, weights, [0, 1]))
    assert behind == calibration_sequences(tokenizer.to_str(), model, weights)


def test_sequences_fit_the_positions_that_are_left(tokenizer):
    model, weights = model_of(24)
    for prefix in ([], [0, 1, 1]):
        found = calibration_sequences(
            begun(tokenizer).to_str(), model, with_prefix(model, weights, prefix), "a b " * 99
        )
        assert {len(one) for one in found} <= set(range(1, 25 - len(prefix)))


def test_every_learned_position_is_looked_at(tokenizer):
    model = describe(vocab_size=270, positions=700)
    assert max(map(len, calibration_sequences(tokenizer.to_str(), model, random_weights(model)))) == 700


def test_a_refusal_names_the_prefix_behind_which_values_would_fit(tokenizer, tmp_path):
    """As in pretrained models, whose first token has massive activations whatever it is."""
    model = describe(vocab_size=270, norm="rms", activation="relu", intermediate_size=40)
    weights = random_weights(model)
    verify = partial(verified_settings, tmp_path, model, self_tests=(), tokenizer=tokenizer.to_str(), recheck=True)

    def saved(size):
        changed = weights | {"positions": weights["positions"].copy()}
        changed["positions"][0] *= np.float32(size)
        (tmp_path / "folded.json").write_bytes(msgspec.json.encode(model))
        save_file(changed, tmp_path / "folded.safetensors")
        return changed

    massive = saved(5e6)
    with pytest.raises(UserError, match=r"would .*; behind a public prefix of <begin> they would fit: write"):
        verify(massive, Settings(), True)
    assert verify(with_prefix(model, massive, [0]), Settings(), True, prefix=[0]).fraction_bits == 18

    hopeless = saved(1) | {"head": weights["head"] * np.float32(1e12)}
    with pytest.raises(UserError, match="head reaches") as refusal:
        verify(hopeless, Settings(), True)
    assert "prefix" not in str(refusal.value)


def test_texts_that_are_none_are_refused(tokenizer):
    model, weights = model_of(24)
    with pytest.raises(UserError, match="the calibration text is empty"):
        calibration_sequences(tokenizer.to_str(), model, weights, "\n\n")


@pytest.mark.slow
@pytest.mark.pretrained
def test_massive_activations_of_a_pretrained_model_fit(smollm2):
    """SmolLM2's first token, whatever it is, has rows a thousand times larger than others from layer 12 on."""
    from entropi.model.decoder import EntropiForCausalLM
    from entropi.model.folding import fold

    theirs, tokenizer = smollm2
    folded = fold(EntropiForCausalLM.from_transformers(theirs))
    model = msgspec.convert(folded.description, Description)
    weights = {name: weight.astype(np.float32) for name, weight in folded.weights.items()}
    text = tokenizer.backend_tokenizer.to_str()
    sequences = [one[:128] for one in calibration_sequences(text, model, weights)]
    ranges = measure_ranges(model, weights, sequences, "quartic")
    assert ranges.largest_mean_square["layer 12 norm"] > 2.0**17  # of which the engine's inverse root is 0
    assert problems(ranges, Settings())
    settings, _ = select_fraction_bits(model, weights, Settings(), sequences, choose=True)
    assert settings.fraction_bits == 18
    assert settings.norm_shifts[0] > 0 > settings.norm_shifts[12]
