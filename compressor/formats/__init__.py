"""Weight formats, one module each; a recipe names the module: `format: int_group`."""
