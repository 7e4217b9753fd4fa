"""A pretrained model from its file to the answer that private inference gives: all but the cryptography."""

import pytest

pytest.importorskip("spu")
import torch

from entropi.chat import head_of, ids_of, load_form
from entropi.private.compute.accuracy import measure
from entropi.private.compute.settings import Settings
from entropi.private.sessions.tokenization import tokenizer_of_stranger

pytestmark = [pytest.mark.slow, pytest.mark.pretrained]
QUESTION = "What is the capital of France?"


def test_a_question_is_answered_as_transformers_answers_it(smollm2, smollm2_file, entropi, surroundings, tmp_path):
    """In the engine's fixed-point numbers, behind the template's header, which is public."""
    theirs, tokenizer = smollm2
    folder = tmp_path / "folded"
    assert entropi("fold", smollm2_file, folder).status == 0

    form = load_form(folder)
    client = tokenizer_of_stranger((folder / "tokenizer.json").read_text(encoding="utf-8"), len(tokenizer))
    ids = ids_of(form.turn(QUESTION, None, begins=True), lambda text: client.encode(text, 100))
    conversation = [{"role": "user", "content": QUESTION}]
    assert ids == tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    prefix = ids_of(head_of(form.first), lambda text: client.encode(text, 100))

    with torch.no_grad():
        whole = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    assert "Paris" in tokenizer.decode(whole[len(ids) :])
    # The likeliest token after every token of question and answer, against the same model in float32.
    found = measure(folder, Settings(embedding="public"), "ref2k", [whole[len(prefix) :]], prefix)
    assert found.same_token >= 1 - 1 / found.positions
    assert abs(found.change) < 0.02
