"""From a tokenizer's chat template, a program, to a `ChatForm`, which is text around messages.

The template is rendered with messages that cannot be mistaken, and what stands around them is the form. That it is one,
and holds for every message, is checked on conversations of other lengths and contents, in characters and in tokens.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from entropi.chat import ChatForm, Pieces, ids_of
from entropi.errors import UserError

_SYSTEM, _FIRST, _SECOND, _THIRD = "Zsystem0Z", "Zquestion1Z", "Zquestion2Z", "Zquestion3Z"
_ANSWER, _OTHER = "Zanswer1Z", "Zanswer2Z"
# Contents that a template or a tokenizer could treat in ways of their own.
_CONTENTS = (
    "What is 2 + 2?",
    "x",
    "two\n\nparagraphs, with a tab\there",
    "{{ braces }} and {% percent %} signs, \\ and 'quotes' \"too\"",
    "Grüße, 你好, 🙂",
    "ends with a newline and a colon:\n:",
)
_WHITE = " \n white space around \n "


def chat_form(tokenizer: PreTrainedTokenizerBase) -> ChatForm | None:
    """The form of the tokenizer's chat template; None where it has no template.

    Raises:
        UserError: a template that is more than text around messages, with what it does.
    """
    if not tokenizer.chat_template:
        return None

    question, dialogue = _rendered(tokenizer, _FIRST), _rendered(tokenizer, _FIRST, _ANSWER, _SECOND)
    first, answer = _around(question, _FIRST)
    said, rest = _around(dialogue, _ANSWER)
    space = said.removeprefix(first + _FIRST + answer)
    if space.strip():
        raise UserError("its chat template says something else before an answer that is followed by another message")
    following, _ = _around(rest, _SECOND)
    trimmed = _trims(tokenizer, first, answer)

    texts = [first, answer, following]
    try:
        begun = _rendered(tokenizer, _FIRST, system=_SYSTEM)
        before, rest = _around(begun, _SYSTEM)
        behind, rest = _around(rest, _FIRST)
        texts += [before, behind] if rest == answer else []
    except UserError:  # no place for a system prompt, or none that is there once
        pass

    pieces = [_pieces(tokenizer, text) for text in texts]
    system = (pieces[3], pieces[4]) if len(pieces) == 5 else None
    form = ChatForm(pieces[0], pieces[1], pieces[2], system, trimmed)
    _check(tokenizer, form, space)
    return form


def _rendered(tokenizer: PreTrainedTokenizerBase, *messages: str, system: str | None = None) -> str:
    """The template applied to messages of user and assistant in turn, up to where an answer begins.

    transformers runs it in a sandbox.
    """
    try:
        text = tokenizer.apply_chat_template(_conversation(*messages, system=system), tokenize=False, **_GENERATING)
    except Exception as error:  # whatever a template raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"its chat template fails: {reason}") from None
    assert isinstance(text, str)
    return text


_GENERATING: dict[str, Any] = dict(add_generation_prompt=True)


def _conversation(*messages: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    begun = [] if system is None else [{"role": "system", "content": system}]
    return begun + [{"role": roles[place % 2], "content": content} for place, content in enumerate(messages)]


def _around(text: str, message: str) -> tuple[str, str]:
    """What stands before and behind a message that must be in `text` once."""
    parts = text.split(message)
    if len(parts) != 2:
        raise UserError(f"its chat template writes a message {len(parts) - 1} times")
    return parts[0], parts[1]


def _trims(tokenizer: PreTrainedTokenizerBase, first: str, answer: str) -> bool:
    """Whether the template drops white space around a message."""
    rendered = _rendered(tokenizer, _WHITE)
    for text, trimmed in ((_WHITE, False), (_WHITE.strip(), True)):
        if rendered == first + text + answer:
            return trimmed
    raise UserError("its chat template changes the white space of messages")


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Pieces:
    """A text as ids of special tokens and plain text between them."""
    added = tokenizer.added_tokens_decoder
    special: dict[str, int | str] = {token.content: number for number, token in added.items() if token.special}
    if not special:
        return (text,) if text else ()
    longest_first = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    return tuple(special.get(part, part) for part in re.split(f"({longest_first})", text) if part)


def _check(tokenizer: PreTrainedTokenizerBase, form: ChatForm, space: str) -> None:
    """Raise `UserError` unless the form says what the template says of several conversations.

    What is read for a message must be the same tokens. Of an answer in the middle only the text is compared: a model
    generates tokens one by one, which need not be those that the same text is cut into. It begins with `space`, and
    ends with what stands before the token that ends it: the model itself generates both.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    end = form.end
    close = "" if end is None else "".join(map(str, form.following[: form.following.index(end)]))
    for place, content in enumerate(_CONTENTS):
        other = _CONTENTS[place - 1]
        turn = ids_of(form.turn(content, None, begins=True), encode)
        _compare(_tokens(tokenizer, content), turn)
        messages, tokens = [content], turn
        for answer, message in ((_ANSWER, other), (_OTHER, content)):
            tokens = tokens + encode(space + answer + close) + ([] if end is None else [end])
            turn = ids_of(form.turn(message, tokens[-1], begins=False), encode)
            messages, tokens = [*messages, answer, message], tokens + turn

            theirs = _tokens(tokenizer, *messages)
            _compare(tokenizer.decode(theirs), tokenizer.decode(tokens))
            if end is not None:
                _compare(theirs[-len(turn) :], turn)
        if form.system is not None:
            begun = ids_of(form.with_system(other).turn(content, None, begins=True), encode)
            _compare(_tokens(tokenizer, content, system=other), begun)


def _tokens(tokenizer: PreTrainedTokenizerBase, *messages: str, system: str | None = None) -> list[int]:
    """Tokens of the rendered template."""
    conversation = _conversation(*messages, system=system)
    return list(tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False, **_GENERATING))


def _compare(theirs: list[int] | str, ours: list[int] | str) -> None:
    if theirs != ours:
        raise UserError("its chat template, or its tokenizer, treats some messages in a way of their own")
