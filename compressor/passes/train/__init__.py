"""Passes that train what other passes rounded or kept."""
