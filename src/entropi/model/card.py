"""What lies beside a saved model's weights: its model card, and the few lines that let transformers load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from entropi.activations import known_activation
from entropi.model.configuration import EntropiConfig

CARD_FILE = "README.md"
LOADER_FILE = "modeling_entropi.py"
# With this in its config.json, a folder loads through AutoModelForCausalLM(trust_remote_code=True), by which
# programs that have not imported entropi, such as lm_eval, find the installed package.
AUTO_MAP = {
    "AutoConfig": "modeling_entropi.EntropiConfig",
    "AutoModelForCausalLM": "modeling_entropi.EntropiForCausalLM",
}
LOADER = '''"""Where transformers finds this model's classes: in the installed package entropi."""

from entropi.model.configuration import EntropiConfig  # noqa: F401
from entropi.model.decoder import EntropiForCausalLM  # noqa: F401
'''
_NORMS = {
    "layernorm": "LayerNorm before attention and feed-forward network",
    "rmsnorm": "RMSNorm before attention and feed-forward network",
}


def model_card(config: EntropiConfig, parameters: int, facts: Mapping[str, str] | None = None) -> str:
    """Markdown with the metadata block that model hubs read.

    Args:
        parameters: how many numbers inference needs.
        facts: further rows of the table, such as what the model was trained on and its perplexity.
    """
    parts = config.parts
    kept = ["powers of attention's logits" if parts.powers else "softmax"]
    kept += [_NORMS[parts.norm]] if parts.norm in _NORMS else []
    kept += ["RMSNorm after attention and feed-forward network"] if config.branch_norm else []
    kept += ["RMSNorm of queries and keys"] if config.query_key_norm else []
    if activation := known_activation(parts.activation):
        kept.append(activation.words)
    softmax = config.softmax_form
    formula = softmax.words if softmax.exact else f"{softmax.formula}: the function that private inference computes"
    rows = {
        "architecture": f"`{config.architecture}`",
        "parameters": f"{parameters:,}",
        "layers, heads, width": f"{config.num_hidden_layers}, {config.num_attention_heads}, {config.hidden_size}",
        "context length": f"{config.max_position_embeddings} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "nonlinear operations in its layers": ", ".join(kept),
        "softmax": formula,
        **(facts or {}),
    }
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["entropi", "private-inference"]
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
{data.to_yaml()}
---

# {config.architecture}

A decoder-only language model with few nonlinear operations, made to be run in private by
`entropi`: a server holds these weights, a client its prompt, and neither sees the other's.

| | |
|---|---|
{table}

With `entropi` installed:

```python
import entropi
from transformers import AutoModelForCausalLM

entropi.EntropiForCausalLM  # makes the family known to transformers
model = AutoModelForCausalLM.from_pretrained("FOLDER")  # or, without that line, trust_remote_code=True
```

`entropi fold FOLDER --output FOLDED` prepares it for `entropi serve`; `entropi diagnose FOLDER` shows the entropy of
its attention heads. It is a plain language model, without instruction tuning or safeguards.
"""


def write_card(folder: Path, card: str) -> None:
    """Put the card and the loader into the folder of a saved model."""
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    (folder / LOADER_FILE).write_text(LOADER, encoding="utf-8")
