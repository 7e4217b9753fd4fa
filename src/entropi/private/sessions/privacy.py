"""What a client leaves to the server of the lengths of prompt and answer, and whose tokenizer it applies."""

from __future__ import annotations

import re
from dataclasses import dataclass

from entropi.errors import UserError
from entropi.private.sessions.tokenization import (
    Encoder,
    check_prompt,
    own_tokenizer,
    sha256_of_tokenizer,
    tokenizer_of_stranger,
)
from entropi.private.wire.messages import (
    MAX_TOKENS,
)


@dataclass(frozen=True)
class Privacy:
    """What the client leaves to the server of two things that the server learns: how long prompt and answer are.

    Attributes:
        tokenizer: content of a tokenizer.json of one's own to use in place of the server's.
        tokenizer_sha256: of the tokenizer.json that the server must send; then it is taken whatever its form.
        pad_to: a prompt is filled up at its front to a multiple of so many tokens. The model reads the filling, so this
            changes the answer.
        pad_text: what it is filled up with, from its end backwards and again as long as needed; public text like the
            prompt changes answers least. By default it is the token that ends a text.
        stop_tokens: by name, the tokens that end an answer; by default those that usually end a text. What the server
            says of that is not asked.
        full_length: ask for all tokens whatever comes, and cut the answer afterwards.
        no_prefix: refuse a server that puts a public text before every prompt.

    Raises:
        UserError: a value out of range; one's own tokenizer and a hash of the server's at once.
    """

    tokenizer: str | None = None
    tokenizer_sha256: str | None = None
    pad_to: int = 1
    pad_text: str | None = None
    stop_tokens: tuple[str, ...] | None = None
    full_length: bool = False
    no_prefix: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.pad_to <= MAX_TOKENS:
            raise UserError(f"pad_to is {self.pad_to} but must be between 1 and {MAX_TOKENS}")
        if self.pad_text is not None:
            check_prompt(self.pad_text)
        if self.tokenizer is not None and self.tokenizer_sha256 is not None:
            raise UserError("a tokenizer of one's own leaves no use for the hash of the server's: give one of the two")
        if self.tokenizer_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.tokenizer_sha256):
            raise UserError("tokenizer_sha256 must be 64 hexadecimal digits, as sha256sum writes them")

    def encoder(self, sent: str, vocab_size: int, where: str) -> Encoder:
        """How prompts are encoded, given the tokenizer.json that the server `where` sent.

        Raises:
            UserError: it is none that this client applies; whatever the prompt is.
        """
        try:
            if self.tokenizer is not None:
                return own_tokenizer(self.tokenizer)
            if self.tokenizer_sha256 is None:
                return tokenizer_of_stranger(sent, vocab_size)
            if sha256_of_tokenizer(sent) == self.tokenizer_sha256:
                return own_tokenizer(sent)
        except UserError as error:
            who = "--tokenizer is one" if self.tokenizer is not None else f"{where} sent a tokenizer"
            raise UserError(f"{who} {error}") from None
        raise UserError(f"{where} sent another tokenizer than the one with the given SHA-256")


USUAL = Privacy()
