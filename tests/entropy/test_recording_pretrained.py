"""Recording of a pretrained model while it answers."""

import pytest
import torch

import entropi

pytestmark = [pytest.mark.slow, pytest.mark.pretrained]
QUESTION, OTHER = "The capital of France is", "The sun rises in the east and sets in"


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("prompts", [[QUESTION], [QUESTION, OTHER]], ids=["one", "padded"])
def test_the_answer_and_its_entropies(smollm2, cache, prompts):
    model, tokenizer = smollm2
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options = dict(max_new_tokens=6, do_sample=False, cache_implementation=cache)
    with entropi.record_entropy(model) as recorded:
        text = model.generate(**inputs, **options)
    answers = tokenizer.batch_decode(text[:, inputs.input_ids.shape[1] :])
    assert answers == [" Paris.\n\nThe answer", " the west.\n\nThe"][: len(prompts)]
    found = recorded.mean()
    assert found.shape == (30, 9)
    assert found[0, 0].item() == pytest.approx(1.293 if len(prompts) == 1 else 1.396, abs=5e-4)

    mask = torch.nn.functional.pad(inputs.attention_mask, (0, 5), value=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(text[:, :-1], attention_mask=mask, position_ids=positions, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for layer, w in enumerate(weights):
        expected = torch.special.entr(w.double()).sum(-1).transpose(1, 2)[mask.bool()].mean(0)
        torch.testing.assert_close(found[layer].double(), expected, atol=1e-4, rtol=1e-4)
