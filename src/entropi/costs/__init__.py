"""Exact operation counts and FLOPs from a configuration."""
