"""Compute with numbers as formats store them: codes, minifloats, grids, codebooks, packed bits, rounded activations."""
