"""Where the kernels that g++ compiled are kept."""

from pathlib import Path

import kept
import pytest


@pytest.fixture(scope="session")
def libraries() -> Path:
    """Return the directory for `simt.build`."""
    return kept.directory("simt")
