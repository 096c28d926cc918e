"""Say what is asked for: recipes, the names in them, and the presets behind `--method` and `--format`."""
