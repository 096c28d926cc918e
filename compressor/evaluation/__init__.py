"""Evaluate the cost of compression: compare a model with its original on text that neither saw."""
