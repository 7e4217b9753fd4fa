"""Chat templates as forms, against transformers' own rendering of the same conversations."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from entropi.chat import ids_of
from entropi.errors import UserError
from entropi.model.chat_template import chat_form

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The shapes of Llama 2's, Gemma's and Llama 3's templates.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content "
    "| trim + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_end|>\n\n' + m.content | trim + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"
)
FITTING = {"chatml": CHATML, "brackets": BRACKETS, "turns": TURNS, "headers": HEADERS}

LOOKS = "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% if 'x' in m.content %}yes{% endif %}{% endfor %}"
REFUSED = {
    "looks into messages": LOOKS,
    "counts letters": "{% for m in messages %}{{ m.content }}{{ '!' * (m.content | length) }}{% endfor %}",
    "says it twice": "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
    "upper case": "{% for m in messages %}{{ '<s>' + m.content | upper }}{% endfor %}",
    "fails": "{{ raise_exception('never') }}",
    "is no template": "{% for %}",
    "numbers its turns": "{% for m in messages %}{{ loop.index | string + m.content }}{% endfor %}",
}


@pytest.fixture
def tokenizer():
    """Byte-level, with merges that join white space and letters, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("s", "e"), ("u", "se"), ("use", "r"), ("e", "r")]
    vocab = {piece: number for number, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    inner = Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def test_no_template_is_no_form(tokenizer):
    assert chat_form(tokenizer) is None


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("message", ["How are you?", "\n\n  user\n", "<|im_end|> is plain text", "é 🙂"])
def test_the_form_says_what_the_template_says(tokenizer, name, message):
    tokenizer.chat_template = FITTING[name]
    form = chat_form(tokenizer)
    ids = ids_of(form.turn(message, None, begins=True), plain(tokenizer))
    if "<|" in message:  # of the user's, it is text: the form is safer than the template
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) < theirs(tokenizer, message).count(
            tokenizer.convert_tokens_to_ids("<|im_end|>")
        )
    else:
        assert ids == theirs(tokenizer, message)


@pytest.mark.parametrize("name", ["chatml", "headers"])
def test_system_prompts_have_their_place(tokenizer, name):
    tokenizer.chat_template = FITTING[name]
    form = chat_form(tokenizer).with_system("Answer in verse.")
    ids = ids_of(form.turn("Hi", None, begins=True), plain(tokenizer))
    assert ids == theirs(tokenizer, "Hi", system="Answer in verse.")


def test_a_template_without_system_prompts_has_no_place_for_one(tokenizer):
    tokenizer.chat_template = TURNS
    assert chat_form(tokenizer).system is None


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_is_a_program_is_refused(tokenizer, name):
    tokenizer.chat_template = REFUSED[name]
    with pytest.raises(UserError) as refused:
        chat_form(tokenizer)
    assert "\n" not in str(refused.value)


def plain(tokenizer):
    def encode(text):
        tokenizer.backend_tokenizer.encode_special_tokens = True
        try:
            return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            tokenizer.backend_tokenizer.encode_special_tokens = False

    return encode


def theirs(tokenizer, message, system=None):
    conversation = [{"role": "system", "content": system}] if system else []
    conversation.append({"role": "user", "content": message})
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
