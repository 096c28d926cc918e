"""One folder per weight format; a recipe names it by the folder: `format: int_group`."""
