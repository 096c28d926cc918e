"""Number formats: codes, minifloats, grids, codebooks, packed bits, rounded activations."""
