"""A chat's form: what stands around the messages of a conversation, as special tokens and plain text.

A tokenizer's chat template is a program. Applied to a prompt by the client, one that the server wrote could let the
number of tokens, which the server sees, tell what the prompt says. So the server turns its template into a form
(`model.chat_template`), and a client does nothing but put the same text around every message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from entropi.errors import UserError

FORM_FILE = "chat.json"  # beside a folded model's tokenizer.json

SpecialToken: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
PlainText: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=1 << 14)]
Pieces: TypeAlias = Annotated[tuple[SpecialToken | PlainText, ...], msgspec.Meta(max_length=64)]


class ChatForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What stands around messages; numbers are ids of special tokens, text is plain.

    Attributes:
        first: before the user's first message, a system prompt of the template's own included.
        answer: between a message and the answer to it.
        following: between an answer and the next message, the token that ends an answer included.
        system: before and behind a system prompt that is given, the latter up to the first message; None where there
            can be none.
        trimmed: white space around a message is dropped.
    """

    first: Pieces
    answer: Pieces
    following: Pieces
    system: tuple[Pieces, Pieces] | None = None
    trimmed: bool = False

    @property
    def end(self) -> int | None:
        """The id of the token that ends an answer, if a special token does."""
        return next((piece for piece in self.following if isinstance(piece, int)), None)

    @property
    def special(self) -> set[int]:
        """Ids of all special tokens in it."""
        parts = (self.first, self.answer, self.following, *(self.system or ()))
        return {piece for pieces in parts for piece in pieces if isinstance(piece, int)}

    def with_system(self, prompt: str) -> ChatForm:
        """The form of conversations that begin with this system prompt.

        Raises:
            UserError: the template has no place for one.
        """
        if self.system is None:
            raise UserError(
                "there is no place for a system prompt: the template has none, or the server's own is there"
            )
        text = prompt.strip() if self.trimmed else prompt
        before, behind = self.system
        return msgspec.structs.replace(self, first=joined(before, text, behind), system=None)

    def turn(self, message: str, last: int | None, *, begins: bool) -> Pieces:
        """What is read for one message, from the end of the answer before it up to where the next answer begins.

        Args:
            message: the user's.
            last: id of the token before it, which was read with the answer and is not said again.
            begins: whether it is the first message.

        Raises:
            UserError: there is nothing in the message.
        """
        text = message.strip() if self.trimmed else message
        if not text.strip():
            raise UserError("the message is empty")
        before = self.first if begins else self.following
        if not begins and self.end is not None and last == self.end:
            before = before[before.index(self.end) + 1 :]
        return joined(before, text, self.answer)


def joined(before: Pieces, text: str, behind: Pieces) -> Pieces:
    """Pieces around a text, as few as possible: a tokenizer may join characters of texts that meet."""
    pieces: list[int | str] = []
    for piece in (*before, text, *behind):
        if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        elif piece != "":
            pieces.append(piece)
    return tuple(pieces)


def ids_of(pieces: Pieces, encode: Callable[[str], Sequence[int]]) -> list[int]:
    """Token ids of pieces, given how plain text is encoded."""
    return [token for piece in pieces for token in ([piece] if isinstance(piece, int) else encode(piece))]


def head_of(pieces: Pieces) -> Pieces:
    """Pieces up to the last special token, whose tokens do not depend on what follows."""
    places = [place for place, piece in enumerate(pieces) if isinstance(piece, int)]
    return pieces[: places[-1] + 1] if places else ()


def load_form(folder: Path) -> ChatForm | None:
    """The chat form in the folder of a folded model, None where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / FORM_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=ChatForm)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise UserError(f"the folded model in {folder} is damaged: {FORM_FILE}: {str(error).splitlines()[0]}") from None
