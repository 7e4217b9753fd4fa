"""Tokenizers that the other side wrote: which ones a client applies to a prompt, and what their lengths may tell."""

import json
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("spu")
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers import decoders as decoding

from entropi.chat import ChatForm
from entropi.errors import UserError
from entropi.private.sessions import client, client_session, generation, tokenization
from entropi.private.sessions.privacy import Privacy
from entropi.private.sessions.sampling import GREEDY
from entropi.private.sessions.tokenization import (
    MAX_PROMPT,
    objections,
    own_tokenizer,
    sha256_of_tokenizer,
    tokenizer_of_stranger,
)

SIZE = 300  # of the model's vocabulary
TEXTS = ["import os", " \n\tdéjà vu — 漢字 🙂", "<|endoftext|></s>", "x", "don't  stop 12345", "\u0000\u009b"]
LLAMA3 = tokenization._PATTERNS[0]


def byte_level():
    """The tokenizer.json of plain byte-level BPE, as a dictionary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: number for number, letter in enumerate(alphabet, 1)}, "th": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoding.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return json.loads(tokenizer.to_str())


def sentencepiece():
    """The same of SentencePiece's BPE, as Llama 2 has it."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "th", "▁th"]
    tokenizer = Tokenizer(
        models.BPE(
            {name: number for number, name in enumerate(names)},
            [("t", "h"), ("▁", "th")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoding.Replace("▁", " "), decoding.ByteFallback(), decoding.Fuse(), decoding.Strip(" ", 1, 0)]
    tokenizer.decoder = decoding.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return json.loads(tokenizer.to_str())


def split_by(pattern, **changes):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **changes}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, step]}


@pytest.mark.parametrize("form", [byte_level, sentencepiece])
def test_plain_tokenizers_are_taken_and_give_every_text_back(form):
    encoder = tokenizer_of_stranger(json.dumps(form()), SIZE)
    for text in TEXTS:
        ids = encoder.encode(text, 1000)
        assert encoder.decode(ids) == text
        assert not {0, 1} & set(ids)  # what spells out a special token is plain text
    assert encoder.ids_of(None) == [0 if form is byte_level else 1]


@pytest.mark.parametrize("pattern", tokenization._PATTERNS)
def test_published_patterns_are_taken(pattern):
    encoder = tokenizer_of_stranger(json.dumps({**byte_level(), "pre_tokenizer": split_by(pattern)}), SIZE)
    for text in TEXTS:
        assert encoder.decode(encoder.encode(text, 1000)) == text


# Each makes the number of tokens, or whether the client goes on, a function of what a prompt says.
FIRST_LETTER = {"type": "Replace", "pattern": {"Regex": "^[aeiou]"}, "content": "x" * 20}
CRAFTED = {
    "spells out the first letter": lambda t: t.update(normalizer=FIRST_LETTER),
    "a sequence that does": lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [FIRST_LETTER]}),
    "lowers letters": lambda t: t.update(normalizer={"type": "Lowercase"}),
    "a pattern that sees the beginning": lambda t: t.update(pre_tokenizer=split_by("^[aeiou]|.")),
    "removes what it splits by": lambda t: t.update(pre_tokenizer=split_by(LLAMA3, behavior="Removed")),
    "splits by the rest": lambda t: t.update(pre_tokenizer=split_by(LLAMA3, invert=True)),
    "no pattern at all": lambda t: t["pre_tokenizer"].update(use_regex=False),
    "adds a space": lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
    "splits by nothing": lambda t: t.update(pre_tokenizer=None),
    "other words": lambda t: t.update(pre_tokenizer={"type": "Whitespace"}),
    "drops merges at random": lambda t: t["model"].update(dropout=0.5),
    "marks endings of words": lambda t: t["model"].update(end_of_word_suffix="</w>"),
    "a model of whole words": lambda t: t.update(model={"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}),
    "a byte without a token": lambda t: t["model"]["vocab"].pop("q"),
    "one id for two bytes": lambda t: t["model"]["vocab"].update(q=t["model"]["vocab"]["r"]),
    "an id outside the model": lambda t: t["model"]["vocab"].update(qq=SIZE),
    "an entry as long as a prompt": lambda t: t["model"]["vocab"].update({"q" * 1000: 258}),
    "another id for a letter": lambda t: t["added_tokens"].append({**t["added_tokens"][0], "content": "q"}),
    "a word that swallows spaces": lambda t: t["added_tokens"].append(
        {"id": 258, "content": "guilty", "single_word": False, "lstrip": True, "rstrip": True, "special": False}
    ),
    "a letter that decodes to another": lambda t: t["added_tokens"].append(
        {"id": 258, "content": "é", "single_word": False, "lstrip": False, "rstrip": False, "special": False}
    ),
    "a phrase as one token": lambda t: t["added_tokens"].append(
        {"id": 258, "content": "secret word", "single_word": False, "lstrip": False, "rstrip": False, "special": False}
    ),
    "decodes by a pattern": lambda t: t.update(decoder={**FIRST_LETTER, "content": ""}),
}


@pytest.mark.parametrize("attack", CRAFTED)
def test_crafted_tokenizers_are_refused_whatever_the_prompt(attack):
    crafted = byte_level()
    CRAFTED[attack](crafted)
    text = json.dumps(crafted)
    assert objections(text, SIZE)
    with pytest.raises(UserError) as caught:  # before it sees any prompt
        Privacy().encoder(text, SIZE, "there:1")
    assert str(caught.value).startswith("there:1 sent a tokenizer that ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["normalizer"]["normalizers"].append(FIRST_LETTER),
        lambda t: t["normalizer"]["normalizers"].insert(0, {"type": "NFKC"}),
        lambda t: t["model"]["vocab"].pop("<0x71>"),
        lambda t: t["decoder"]["decoders"].pop(1),
        lambda t: t["added_tokens"][0].update(special=False),
        lambda t: t.update(pre_tokenizer=split_by("^[aeiou]|.")),
    ],
)
def test_crafted_sentencepiece_tokenizers_are_refused(change):
    crafted = sentencepiece()
    change(crafted)
    assert objections(json.dumps(crafted), SIZE)


def test_the_attack_would_work_on_a_client_that_took_it():
    """What is refused above is a real leak: the length alone tells the first letter."""
    crafted = json.dumps({**byte_level(), "normalizer": FIRST_LETTER})
    lengths = [len(own_tokenizer(crafted).encode(text, 1000)) for text in ("apple", "Apple")]
    assert lengths == [24, 5]


def test_truncation_padding_and_additions_never_reach_a_prompt():
    plain, changed = byte_level(), byte_level()
    changed["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    changed["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 9, "pad_type_id": 0,
        "pad_token": "x",
    }  # fmt: skip
    changed["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    for read in (own_tokenizer, lambda text: tokenizer_of_stranger(text, SIZE)):
        expected, found = (read(json.dumps(file)).encode("the keeper lies", 99) for file in (plain, changed))
        assert found == expected


def test_a_tokenizer_is_pinned_by_its_hash_or_brought_along():
    odd = json.dumps({**byte_level(), "normalizer": {"type": "Lowercase"}})
    for privacy in (Privacy(tokenizer_sha256=sha256_of_tokenizer(odd)), Privacy(tokenizer=odd)):
        encoder = privacy.encoder(odd, SIZE, "there:1")
        assert encoder.decode(encoder.encode("LIES", 99)) == "lies"
    own = Privacy(tokenizer=odd).encoder(json.dumps(byte_level()), SIZE, "there:1")  # whatever the server sends
    assert own.decode(own.encode("LIES", 99)) == "lies"
    with pytest.raises(UserError, match="sent another tokenizer than the one"):
        Privacy(tokenizer_sha256=sha256_of_tokenizer(odd)).encoder(odd + " ", SIZE, "there:1")
    with pytest.raises(UserError, match="--tokenizer is one that cannot be read"):
        Privacy(tokenizer="{}").encoder(odd, SIZE, "there:1")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"pad_to": 0}, "pad_to is 0"),
        ({"pad_to": 1 << 15}, "pad_to is 32768"),
        ({"tokenizer_sha256": "abc"}, "64 hexadecimal digits"),
        ({"tokenizer_sha256": "0" * 64, "tokenizer": "{}"}, "one of the two"),
    ],
)
def test_impossible_privacy(options, complaint):
    with pytest.raises(UserError, match=complaint):
        Privacy(**options)


# --- What goes wrong is one line --------------------------------------------------------------------------------------


def unknown_token_missing():
    return json.dumps({**byte_level(), "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "?"}})


def panics():
    return json.dumps({**byte_level(), "normalizer": {"type": "Prepend", "prepend": ""}})


@pytest.mark.parametrize("text", [unknown_token_missing, panics])
def test_failures_of_the_tokenizers_library_are_one_line(text, capfd):
    with pytest.raises(UserError, match="cannot encode this prompt"):
        own_tokenizer(text()).encode("ab", 99)
    assert capfd.readouterr().err == ""


def test_standard_error_is_there_again_afterwards(capfd):
    encoder = own_tokenizer(panics())

    def attempt():
        for _ in range(50):
            with pytest.raises(UserError):
                encoder.encode("ab", 99)

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokenization.os.write(2, b"here")
    assert capfd.readouterr().err == "here"


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [("x" * (MAX_PROMPT + 1), f"more than {MAX_PROMPT} characters"), ("a\udc80", "not valid Unicode")],
)
def test_prompts_that_no_tokenizer_is_to_see(prompt, complaint):
    with pytest.raises(UserError, match=complaint):
        client.ask("127.0.0.1:1", prompt, 1)  # before anybody is asked


def test_a_vocabulary_may_lack_bytes_that_text_does_not_have():
    """As those of pretrained models do; what cannot be encoded is not sent."""
    file = byte_level()
    for letter in (*tokenization._BYTES_UTF8_LACKS, *tokenization._CONTROLS):
        del file["model"]["vocab"][letter]
    ids = {name: number for number, name in enumerate(file["model"]["vocab"])}
    file["model"]["vocab"] = ids
    encoder = tokenizer_of_stranger(json.dumps(file), SIZE)
    for text in ("tab\t, line\r\n", "é 你好 🙂", "\x7f"):
        assert encoder.decode(encoder.encode(text, 99)) == text
    for text in ("bell \x07", "plane 5: \U00050000"):
        with pytest.raises(UserError, match="would change this prompt"):
            encoder.encode(text, 99)
    del ids["Ċ"]
    with pytest.raises(UserError, match="1 bytes of text have no token"):
        tokenizer_of_stranger(json.dumps(file), SIZE)


def test_a_text_that_cannot_fit_is_not_encoded():
    encoder = tokenizer_of_stranger(json.dumps(byte_level()), SIZE)
    with pytest.raises(UserError, match="more than 33 tokens of this model can hold"):
        encoder.encode("x" * MAX_PROMPT, 33)


# --- How long prompt and answer look ----------------------------------------------------------------------------------


def a_session(prompt, max_new_tokens, positions=32, **options):
    """A client's session as far as lengths go, without a server."""
    question = generation.Generation(prompt, max_new_tokens, GREEDY, 0, generation.Watcher(), Privacy(**options))
    session = client_session.ClientSession(SimpleNamespace(name="there:1"), None, None, question)
    session.welcome = SimpleNamespace(prefix=[], description=SimpleNamespace(positions=positions, vocab_size=SIZE))
    session.tokenizer = tokenizer_of_stranger(json.dumps(byte_level()), SIZE)
    session.prepare(question)
    return session


def test_prompts_are_filled_up_to_lengths_that_tell_less():
    lengths = set()
    for letters in range(1, 25):
        padding = a_session("x" * letters, 1, pad_to=8).generation.padding
        assert set(padding) <= {0}
        lengths.add(len(padding) + letters)
    assert lengths == {8, 16, 24}
    assert a_session("xx", 1).generation.padding == []
    fill = a_session("xx", 1).tokenizer.encode("public.", 99)

    def filling(letters):
        return a_session("x" * letters, 1, pad_to=16, pad_text="public.").generation.padding

    assert filling(2) == fill + fill  # fourteen
    assert filling(9) == fill
    assert filling(10) == fill[1:]
    assert filling(1) == fill[-1:] + fill + fill
    assert a_session("x" * 30, 1, pad_to=15).generation.padding == []
    with pytest.raises(UserError, match="filled up to 32 it leaves no room for 2 new ones"):
        a_session("x" * 30, 2, pad_to=8)


def test_an_answer_does_not_end_at_a_word_that_a_server_names():
    session = a_session("x", 4)
    session.generation.chat = True
    session.welcome.chat = ChatForm(first=("user: ",), answer=(0, "assistant: "), following=(0, "user: "))
    session.prepare(session.generation)
    assert session.generation.stop_ids == [0, 0]
    session.welcome.chat = ChatForm(first=("user: ",), answer=(0, "assistant: "), following=(257, "user: "))
    with pytest.raises(UserError, match="special tokens that its tokenizer does not have"):
        session.prepare(session.generation)


def test_the_client_says_which_tokens_end_an_answer():
    question = a_session("x", 4).generation
    question.new_tokens = [5, 0]
    assert question.is_finished
    named = a_session("x", 4, stop_tokens=("th",)).generation
    named.new_tokens = [5, 0]
    assert not named.is_finished
    named.new_tokens = [5, 257]
    assert named.is_finished
    with pytest.raises(UserError, match="no token '<end>' to stop at"):
        a_session("x", 4, stop_tokens=("<end>",))


def test_with_full_length_an_answer_is_cut_on_this_side_alone():
    question = a_session("x", 4, full_length=True).generation
    for tokens in ([5], [5, 0], [5, 0, 6]):
        question.new_tokens = tokens
        assert not question.is_finished
    question.new_tokens = [5, 0, 6, 0]
    assert question.is_finished
    assert question.answer_ids == [5, 0]
