"""`python -m compressor`: the same as the command `compress`."""

from compressor.cli import main

if __name__ == "__main__":
    main()
