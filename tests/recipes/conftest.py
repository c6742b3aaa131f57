import sys
from pathlib import Path

# The recipes are scripts, not a package: each finds its neighbours beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "quickstart"))
