"""A training loop of one's own with the entropy regulariser, for any model that transformers has.

python examples/training_loop.py [STEPS]
"""

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import entropi

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 50
LAYERS, HEADS, LENGTH, BATCH = 2, 4, 64, 16
WEIGHT = 1e-5  # lambda: the published one, for a penalty that is summed over rows

torch.manual_seed(0)
text = torch.tensor(list(Path(torch.__file__).read_bytes()))  # any text; its bytes are the tokens
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=256,
        bos_token_id=0,
        eos_token_id=0,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=LAYERS,
        n_head=HEADS,
        attn_pdrop=0,
        resid_pdrop=0,
    )
)
regularizer = entropi.EntropyRegularizer(LAYERS, HEADS, margin=0.2)
# The regulariser's thresholds are learned with the model, and not decayed.
parameters = [{"params": model.parameters()}, {"params": regularizer.parameters(), "weight_decay": 0}]
optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)

for step in range(STEPS):
    starts = torch.randint(0, len(text) - LENGTH, (BATCH,))
    batch = torch.stack([text[start : start + LENGTH] for start in starts])
    with entropi.record_entropy(model, keep_rows=True, gradients=True) as recorded:
        loss = model(batch, labels=batch).loss
        # One tensor (B, H, T) a layer, in nats: the entropy of every attention row of this pass.
        entropies = [passes[0] for passes in recorded.rows.values()]
        penalty = WEIGHT * regularizer(entropies)
        (loss + penalty).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == STEPS - 1:
        mean = torch.stack([entropy.mean() for entropy in entropies]).tolist()
        layers = ", ".join(f"{value:.2f}" for value in mean)
        print(f"step {step:3}  loss {loss.item():.3f}  penalty {penalty.item():.4f}  entropy by layer {layers} nats")

print(f"thresholds theta between {regularizer.threshold.min():.3f} and {regularizer.threshold.max():.3f}")
