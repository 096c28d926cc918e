"""Files that travel with the package: the demo model that the project trained (scripts/train_demo_model.py)."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "demo"
