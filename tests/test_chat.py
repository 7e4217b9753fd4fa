"""The form of a chat: what is read for a message, in which order, and what is not said twice."""

from __future__ import annotations

import msgspec
import pytest

from entropi.chat import FORM_FILE, ChatForm, head_of, ids_of, joined, load_form
from entropi.errors import UserError

FORM = ChatForm(
    first=(1, "system\nBe kind.", 2, "\n", 1, "user\n"),
    answer=(2, "\n", 1, "assistant\n"),
    following=(2, "\n", 1, "user\n"),
    system=((1, "system\n"), (2, "\n", 1, "user\n")),
)


def test_text_that_meets_text_is_one_piece():
    assert FORM.turn("Hi", None, begins=True) == (
        *FORM.first[:-1],
        "user\nHi",
        *FORM.answer,
    )
    assert joined((), "a", ("b", 3, "c")) == ("ab", 3, "c")
    assert joined((3,), "", (4,)) == (3, 4)


def test_the_token_that_ended_the_answer_is_not_said_again():
    assert FORM.turn("Hi", 2, begins=False) == ("\n", 1, "user\nHi", *FORM.answer)
    assert FORM.turn("Hi", 7, begins=False) == (2, "\n", 1, "user\nHi", *FORM.answer)  # an answer that was cut
    spaced = msgspec.structs.replace(FORM, following=(" ", 2, "[INST] "))
    assert spaced.turn("Hi", 2, begins=False) == ("[INST] Hi", *FORM.answer)


def test_a_system_prompt_has_its_place_or_none():
    begun = FORM.with_system("Be brief.")
    assert begun.turn("Hi", None, begins=True)[:4] == (1, "system\nBe brief.", 2, "\n")
    with pytest.raises(UserError, match="no place for a system prompt"):
        begun.with_system("Again.")


def test_white_space_is_dropped_where_the_template_drops_it():
    trimmed = msgspec.structs.replace(FORM, trimmed=True)
    assert "user\nHi" in trimmed.turn("  Hi\n", None, begins=True)
    assert "user\n  Hi\n" in FORM.turn("  Hi\n", None, begins=True)


@pytest.mark.parametrize("message", ["", " ", "\n\t"])
def test_an_empty_message_is_refused(message):
    with pytest.raises(UserError, match="the message is empty"):
        FORM.turn(message, None, begins=True)


def test_the_public_beginning_ends_with_a_special_token():
    assert head_of(FORM.first) == FORM.first[:-1]
    assert head_of(("only text",)) == ()
    assert ids_of((1, "ab", 2), lambda text: [ord(letter) for letter in text]) == [1, 97, 98, 2]


def test_a_form_is_read_back_and_damage_is_one_line(tmp_path):
    assert load_form(tmp_path) is None
    (tmp_path / FORM_FILE).write_bytes(msgspec.json.encode(FORM))
    assert load_form(tmp_path) == FORM
    for damage in (b"{", b'{"first": [-1], "answer": [], "following": []}', b'{"first": []}', b"\xff"):
        (tmp_path / FORM_FILE).write_bytes(damage)
        with pytest.raises(UserError, match=r"damaged: chat\.json") as refused:
            load_form(tmp_path)
        assert "\n" not in str(refused.value)
