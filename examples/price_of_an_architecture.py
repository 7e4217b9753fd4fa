"""What architectures will cost in private, before anything is trained: operations exactly, bytes and time predicted.

python examples/price_of_an_architecture.py
"""

from entropi import EntropiConfig, cost

TOKENS = 128  # of the prompt

print(f"GPT-2 small's sizes, a prompt of {TOKENS} tokens, softmax kernel t=3, 100 Mbit/s and 80 ms\n")
print(f"{'architecture':16} {'parameters':>11} {'GB':>6} {'messages':>9} {'minutes':>8}   one more token, MB")
for name in ("SM+LN+G", "SM+LN+R", "SM+ScFuFFN", "SM(t)+ScFuFFN"):
    # The defaults are GPT-2 small's sizes. softmax="power-3" is a model trained with the kernel t=3.
    config = EntropiConfig(architecture=name, softmax="power-3")
    price = cost(config, TOKENS, network="wan")
    prompt, further = price.prediction.prompt, price.prediction.further
    print(
        f"{name:16} {price.counts.parameters:11,} {prompt.bytes / 1e9:6.2f} {prompt.messages:9,.0f} "
        f"{prompt.latency / 60:8.1f}   {further.bytes / 1e6:.0f}"
    )

print("\nWhere the bytes of the last one go:")
for operation in list(prompt.by_operation().values())[:5]:
    print(f"  {operation.name:10} {operation.bytes / 1e6:7.1f} MB")

nonlinear = ", ".join(f"{one.operation} {one.count} x {one.shape}" for one in price.folded.nonlinear)
print(f"\nNonlinear operations left after folding: {nonlinear}")
