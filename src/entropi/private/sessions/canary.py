"""A canary: a public prompt whose plaintext answer the owner publishes, and clients may ask for.

It shows that server, client and settings compute what the owner's plaintext does. It is no proof against a server
that wants to deceive, which can tell the canary by its length and timing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from entropi.errors import UserError
from entropi.private.compute.description import Description
from entropi.private.compute.program import cached_tokens, run_plain
from entropi.private.compute.settings import Settings
from entropi.private.sessions.tokenization import Encoder, check_prompt
from entropi.private.wire.messages import Canary

if TYPE_CHECKING:
    from entropi.private.sessions.generation import Answer

CANARY_TOKENS = 4
# A right answer's logits are wrong by less than this; the likeliest token must lead by twice as much.
TOLERANCE = 0.1


def make_canary(
    prompt: str,
    encoder: Encoder,
    model: Description,
    weights: Mapping[str, np.ndarray],
    settings: Settings,
    max_new_tokens: int,
) -> Canary:
    """The canary of a prompt: as many of the likeliest tokens as are beyond doubt, four at most.

    Raises:
        UserError: a prompt that does not fit, or whose very first token is a near tie.
    """
    if not prompt:
        raise UserError("the canary is empty: give it a public text")
    check_prompt(prompt)
    if len(prompt) > 300:
        raise UserError(f"the canary has {len(prompt)} characters, at most 300 are possible")
    most = min(CANARY_TOKENS, max_new_tokens)
    positions = model.positions - cached_tokens(weights)
    ids = encoder.encode(prompt, positions)
    if len(ids) > positions:
        raise UserError(f"the canary has {len(ids)} tokens, and the model {positions} positions")
    most = min(most, positions + 1 - len(ids))
    tokens, logits = run_plain(model, weights, ids, most, settings.exact_softmax_as)
    second = [float(np.partition(row, -2)[-2]) for row in logits]
    best = [float(row.max()) for row in logits]
    clear = [high - low > 2 * TOLERANCE for high, low in zip(best, second)]
    count = clear.index(False) if False in clear else most
    if not count:
        raise UserError(
            f"the two likeliest tokens after the canary differ by {best[0] - second[0]:.2g}, which is too little to "
            "tell a wrong answer by: choose another text"
        )
    return Canary(prompt, tokens[:count], best[:count])


def complaint(canary: Canary, answer: Answer, settings: Settings) -> str | None:
    """How an answer differs from what the owner published, None if it does not."""
    step = 0.0 if settings.logit_bits is None else 2.0**-settings.logit_bits
    found, expected = answer.record.new_tokens, canary.tokens
    if found != expected:
        place = next(n for n, (one, other) in enumerate(zip([*found, -1], [*expected, -2])) if one != other)
        return f"token {place + 1} is another than the owner published"
    for place, (row, logit) in enumerate(zip(answer.logits, canary.logits), start=1):
        if not abs(float(row.max()) - logit) < TOLERANCE + 1e-3 * abs(logit) + step / 2:
            return f"the logit of token {place} is {float(row.max()):.4g} instead of {logit:.4g}"
    return None
