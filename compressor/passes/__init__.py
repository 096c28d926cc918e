"""One file per algorithm; a recipe names it by the file: `pass: gptq`."""
