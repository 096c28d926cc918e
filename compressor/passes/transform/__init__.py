"""Change weights so that they round better, with the model computing the same."""
