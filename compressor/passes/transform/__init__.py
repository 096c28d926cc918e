"""Passes that change weights so that they round with less error, while the model computes the same."""
