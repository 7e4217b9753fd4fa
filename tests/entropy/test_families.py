"""Recording every family of models that transformers can build tiny: right, or refused in one line."""

import pytest
import torch
import transformers

import families
from entropi.entropy import interface, recorder


@pytest.mark.slow
def test_every_family_is_right_or_refused_and_the_table_says_which():
    found, without = families.families()
    results = families.sweep(found)
    failures = [f"{r.family.section} {r.family.name}: {r.reason}" for r in results if r.outcome == "wrong"]
    written = families.TABLE.read_text()
    if f"transformers {transformers.__version__}," in written:
        here = families.rows(families.table(results, without))
        there = families.rows(written)
        for section, name in here | there:
            now, then = (rows.get((section, name), "nothing") for rows in (here, there))
            if now != then:
                failures.append(
                    f"docs/families.md is stale (python tests/families.py --write), {section}: {now}, not {then}"
                )
    assert not failures, "\n".join(failures)
    assert sum(r.outcome == "right" for r in results) > len(results) / 2


LLAMA = families.Family("llama", "causal", "LlamaForCausalLM")
BERT = families.Family("bert", "text", "BertForMaskedLM")
BLOOM = families.Family("bloom", "causal", "BloomForCausalLM")
GRANITE_SWA = families.Family("granite_swa", "causal", "GraniteSWAForCausalLM")
GPT_OSS = families.Family("gpt_oss", "causal", "GptOssForCausalLM")


def test_the_sweep_finds_what_is_wrong(monkeypatch):
    """Entropies a little off, rows counted that are padding, and outputs that differ."""
    assert families.examine(LLAMA).outcome == "right"
    operation = interface.entropy_attention

    def off(*args, **kwargs):
        output, entropy = operation(*args, **kwargs)
        return output, entropy + 1e-4

    def other(*args, **kwargs):
        output, entropy = operation(*args, **kwargs)
        return output * 1.01, entropy

    for changed, words in ((off, "entropies of layer 0"), (other, "outputs differ")):
        with monkeypatch.context() as patch:
            patch.setattr(interface, "entropy_attention", changed)
            result = families.examine(LLAMA)
        assert result.outcome == "wrong"
        assert words in result.reason
    with monkeypatch.context() as patch:
        patch.setattr(recorder.EntropyRecorder, "valid_rows", lambda *args: None)
        result = families.examine(BERT)
    assert result.outcome == "wrong"
    assert result.reason.startswith("left padding: entropies of layer 0")


def test_refusals_and_crashes_are_told_apart(monkeypatch):
    refused = families.examine(BLOOM)
    assert refused.outcome == "refused"
    assert "BloomAttention" in refused.reason

    def crash(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("two\nlines")

    monkeypatch.setattr(interface, "entropy_attention", crash)
    result = families.examine(LLAMA)
    assert result.outcome == "wrong"
    assert result.reason == "crashes: OutOfMemoryError: two lines"


def test_a_sinks_share_counts():
    weights = torch.tensor([0.5, 0.25]).expand(1, 1, 1, 2)
    attention = families.Attention("a.0", "a.*", 0, "self", weights)
    assert attention.entropies.item() == pytest.approx(1.0397207708, abs=1e-6)  # of 1/2, 1/4, 1/4
    for family in (GRANITE_SWA, GPT_OSS):  # sinks after and in the softmax
        model = family.build(attn_implementation="eager")
        attentions, _, _ = families.reference(model, families.make_inputs(model, None))
        assert all(each.weights.sum(-1).max() < 1 for each in attentions)
