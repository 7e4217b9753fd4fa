"""What crosses between client and server, and how each knows the other: imports neither JAX nor SPU."""
