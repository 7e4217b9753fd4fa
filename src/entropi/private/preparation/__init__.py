"""Products before the prompt is known: what can be prepared, computing it, keeping it once, and using it.

A product of secret values becomes one opened message where a product of random numbers was prepared before (Beaver,
CRYPTO 1991; for a server's matrices Delphi, USENIX Security 2020): the random numbers mask the operands, and what is
missing is linear in them. The engine's own protocols make the products of random numbers; ours is linear algebra modulo
2^64 on shares.
"""
