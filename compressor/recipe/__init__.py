"""Recipes: what a run is asked to do, the names in recipes, and the presets behind `--method` and `--format`."""
