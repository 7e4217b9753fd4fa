"""A causal model that reads a text token by token, in the clear, and keeps what it knows of the text before."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel


class Reader:
    """A model and the text that it was last shown, of which it needs to read only what is new the next time.

    Args:
        model: in evaluation mode.
        vocabulary: numbers of its tokens.
        name: for people.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: dict[str, int], name: str) -> None:
        self._model: Any = model
        self.vocabulary, self.name = vocabulary, name
        self.positions = int(model.config.max_position_embeddings)
        self._ids: list[int] = []
        self._cache, self._logits = DynamicCache(), np.zeros(0)

    def read(self, ids: Sequence[int]) -> Reading:
        """Read a text of `positions` tokens at most, >= 1; what is read of its continuation does not change this."""
        ids = list(ids)
        if self._ids != ids[: len(self._ids)]:
            self._ids, self._cache = [], DynamicCache()
        if fresh := ids[len(self._ids) :]:
            self._logits = self.after(self._cache, fresh)
            self._ids = ids
        return Reading(self, copy.deepcopy(self._cache), self._logits)

    def after(self, cache: DynamicCache, fresh: list[int]) -> Any:
        """Logits `(V,)` after the last of some tokens that follow those of `cache`, which has them then."""
        with torch.inference_mode():
            result = self._model(torch.tensor([fresh]), past_key_values=cache, use_cache=True)
        return result.logits[0, -1].double().numpy()


class Reading:
    """A text that was read: `logits` `(V,)` of its next token."""

    def __init__(self, reader: Reader, cache: DynamicCache, logits: Any) -> None:
        self._reader, self._cache, self.logits = reader, cache, logits

    def go_on(self, token: int) -> None:
        """Read one more token."""
        self.logits = self._reader.after(self._cache, [token])
