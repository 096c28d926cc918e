"""Change how the modules of a model compute: sub-layers left out or resized, Hadamard transforms, a rounded KV cache."""
