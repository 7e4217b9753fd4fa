"""A new activation, from the architecture's name to a private answer: squared ReLU, x relu(x).

python examples/new_activation.py

Three entries make it known: to names and files, to training, and to the private program. Here they are added while
the program runs; docs/extending.md says in which files they belong, and which tests then hold them together.
"""

import msgspec
import numpy as np
import torch
from torch.nn import functional

import entropi
from entropi import activations
from entropi.model import feedforward
from entropi.private.compute import layers
from entropi.private.compute.description import Description
from entropi.private.compute.engine import Simulation
from entropi.private.compute.functions import relu
from entropi.private.compute.program import forward
from entropi.private.compute.settings import Settings

# 1. Its part of an architecture's name, its name in files and in words. It is not gated: one matrix in, one out.
activations.ACTIVATIONS["SqR"] = activations.Activation("squared_relu", "squared ReLU")
# 2. What torch trains.
feedforward.ACTIVATIONS["squared_relu"] = lambda x: x * functional.relu(x)
# 3. What the secure engine computes, and what that approximates: here it is exact. A comparison and a product.
layers.ACTIVATIONS["squared_relu"] = (lambda x: x * relu(x), None)

torch.manual_seed(0)
config = entropi.EntropiConfig(
    architecture="SM+LN+SqR",
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    softmax="power-2",  # the softmax of private inference from the start
)
model = entropi.EntropiForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(60):  # a text in which every token follows from the one before
    start = torch.randint(0, 64, (16, 1))
    tokens = (start + 5 * torch.arange(16)) % 64
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"trained: loss {loss.item():.3f} nats a token")

folded = entropi.fold(model.eval())
known = msgspec.convert(folded.description, Description)

# All parties as threads of this process, computing in the engine's fixed-point numbers (REF2K has no cryptography).
prompt = [(3 + 5 * i) % 64 for i in range(8)]
engine = Simulation("ref2k", Settings())
for name, weight in folded.weights.items():
    engine.hold(name, weight, owner=0)
engine.hold("embedded", folded.weights["embedding"][prompt], owner=1)
for stage in forward(known, len(prompt), 0, known.softmax, embedding="public"):
    engine.run(stage)
private = engine.reveal("logits")[-1]
with torch.no_grad():
    plain = model(torch.tensor([prompt])).logits[0, -1].numpy()
print(f"in private: next token {private.argmax()}, in plaintext {plain.argmax()}")
print(f"largest difference of a logit {np.abs(private - plain).max():.4f}")

price = entropi.cost(config, 8).prediction.prompt.by_operation()["activation"]
print(f"price of the activation for 8 tokens: {price.bytes / 1e6:.2f} MB, {price.messages:,.0f} messages")
