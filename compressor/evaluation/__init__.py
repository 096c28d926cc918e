"""What compression cost: comparisons of a model with its original on text that neither saw."""
