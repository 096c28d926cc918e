"""Passes that round weights, or cached keys and values, to the numbers of a format."""
