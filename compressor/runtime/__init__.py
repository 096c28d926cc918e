"""Running models that were compressed."""
