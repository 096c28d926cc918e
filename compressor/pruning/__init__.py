"""Structured pruning: which channels, heads and blocks go, and what the rest becomes."""
