"""Whom a server lets in, when, and what is kept about it: the server's alone; imports neither JAX nor SPU."""
