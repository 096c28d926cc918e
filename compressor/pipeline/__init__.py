"""Run a recipe on a model: prepare, prune, search, compress block by block, train, write."""
