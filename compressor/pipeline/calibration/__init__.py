"""Calibration: which tokens, their hidden states on the way through the model, and statistics of them."""
