"""Files that travel with the package: the demo model that scripts/train_demo_model.py trained, facts, code for DeciLM."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "demo"
DECILM_CODE = Path(__file__).parent / "decilm.py"
