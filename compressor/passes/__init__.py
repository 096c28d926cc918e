"""Compression algorithms, one file each. A recipe names an algorithm by its file: `pass: gptq`."""
