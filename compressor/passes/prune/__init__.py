"""Passes that remove blocks, sub-layers, channels, heads or single weights."""
