"""Whether a directory holds what the run that wrote it computed, and whether every loader that claims to read it does."""
