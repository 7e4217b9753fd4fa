"""Where heads look, against weights that are all held."""

import pytest
import torch

from entropi.entropy.patterns import attention_pattern
from exactness import make


@pytest.mark.parametrize(("queries", "keys"), [(19, 19), (7, 19), (1, 19), (19, 6), (200, 1), (70, 90)])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_patterns_are_sums_of_weights(queries, keys, is_causal, with_sinks, softcap, monkeypatch):
    """Queries at the end of keys, and rows that see nothing; blocks that do not divide the length."""
    monkeypatch.setattr("entropi.entropy.patterns.BLOCK_ROWS", 8)
    (query, key, _), *_ = make(queries, keys, 8, torch.float64)
    sinks = torch.linspace(-1, 2, 3, dtype=torch.float64) if with_sinks else None
    key = key[:, :1]
    found = attention_pattern(query, key, is_causal=is_causal, softcap=softcap, sinks=sinks, enable_gqa=True)

    logits = query @ key.transpose(-1, -2) / 8**0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    back = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    weights = logits.exp() * (back >= 0 if is_causal else True)
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    weights = weights / total.clamp(min=1e-300)
    rows = torch.arange(queries) + keys - queries
    if (rows >= 2).any():
        weights, back = weights[:, :, rows >= 2], back[rows >= 2]
    expected = [weights * back, weights[..., :1], weights * (back == 1), weights * (back == 0)]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs.sum(-1).mean(-1))
    if with_sinks:
        without = attention_pattern(query, key, is_causal=is_causal, softcap=softcap, enable_gqa=True)
        assert (found.first_weight < without.first_weight).all()


def test_patterns_are_shares_whatever_weights_are_divided_by():
    (query, key, _), *_ = make(12, 19, 8, torch.float64)
    found, expected = (attention_pattern(query, key, softmax=f"polynomial-2{over}") for over in ("/keys", ""))
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)
