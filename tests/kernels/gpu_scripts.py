"""Makes the modules of scripts/gpu importable to the tests that import this one."""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu"
sys.path.insert(0, str(SCRIPTS))
