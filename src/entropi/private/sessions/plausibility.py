"""Logits that no right run reveals: what a client can tell of values that left the range of fixed-point numbers.

A row too large for its norm becomes zeros, and so does nearly all that numbers which wrapped come to, since they lie
anywhere in the ring: behind the final norm the logits are then the head's bias. Without norms wrapped numbers come out
millions of times too large. What leaves the range in a row that is not the last one's, or in attention scores alone,
may give logits of the usual size, which nothing tells from right ones.
"""

from __future__ import annotations

import numpy as np

from entropi.private.compute.settings import Settings

ROOM = 4.0  # times what logits of the calibration text reach
_SLACK = 1.0  # for models whose logits are nearly nothing, and for rounding
_DIGITS = 4  # last digits by which the logits of a row of zeros are wrong at most


def implausible(logits: np.ndarray, settings: Settings) -> str | None:
    """Why these logits, `(V,)` or those of the likeliest tokens, cannot be right; None if they can.

    A right largest logit equals the bias's about once in a million tokens. Where logits are rounded it may do so often,
    and is not looked at.
    """
    largest = float(np.abs(logits).max())
    if settings.largest_logit is not None and not largest <= (most := ROOM * settings.largest_logit + _SLACK):
        return f"logits reach {largest:.3g}, and this model's are below {most:.3g}"
    if settings.blank_logit is None or settings.logit_bits is not None:
        return None
    distance = abs(float(logits.max()) - settings.blank_logit)
    return "the logits are those of a row of zeros" if distance <= _DIGITS * 2.0**-settings.fraction_bits else None
