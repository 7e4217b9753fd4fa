"""How spread out every attention head of a Hugging Face model is, in words and as a picture.

python examples/entropy_of_a_model.py                      # a small GPT-2 with random weights, no download
python examples/entropy_of_a_model.py NAME_OR_FOLDER       # any causal model of the hub or of your disk
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import entropi
from entropi.report import figures

LENGTH = 128  # tokens of the text

if len(sys.argv) > 1:
    name = sys.argv[1]
    model = AutoModelForCausalLM.from_pretrained(name)
    text = Path(__file__).read_text(encoding="utf-8")  # any text will do; this script is one
    tokens = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt").input_ids[:, :LENGTH]
else:
    name = "random GPT-2"
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, n_embd=64, vocab_size=1000, bos_token_id=0, eos_token_id=0))
    tokens = torch.randint(0, 1000, (1, LENGTH))

# The model runs under fused attention: no matrix of attention weights is ever held.
with torch.no_grad(), entropi.record_entropy(model.eval()) as recorded:
    model(tokens)

entropy = recorded.mean()  # (layers, heads), nats
found = entropi.diagnose(entropy, context_length=tokens.shape[1])
print(f"{name}: {entropy.shape[0]} layers of {entropy.shape[1]} heads over {tokens.shape[1]} tokens")
print(f"largest mean entropy {found.max_observed:.2f} nats; a causal mask allows at most {found.max_causal:.2f}")
print(found.verdict)

# (A causal row i sees only i + 1 tokens: no head's mean reaches log T, where the scale ends; the most is marked.)
picture = Path("entropy.png")
figures.write_figure(
    figures.entropy_heatmap(found.entropy, found.max_possible, name, context_length=tokens.shape[1]), picture
)
print(f"heatmap in {picture}")
