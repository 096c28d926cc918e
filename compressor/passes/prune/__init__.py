"""Remove blocks, sub-layers, channels, heads or single weights."""
