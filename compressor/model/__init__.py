"""Checkpoints: reading them block by block, the facts of model families, and writing the result."""
