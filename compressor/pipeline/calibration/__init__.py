"""Calibration: the tokens, their hidden states on the way through the model, and statistics of layer inputs."""
