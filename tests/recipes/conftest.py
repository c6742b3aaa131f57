import sys
from pathlib import Path

# The recipes are scripts, not a package: each finds its neighbours beside it.
FOLDERS = (
    *("shared", "quickstart", "stability", "stress", "initialisation", "downstream"),
    *("compute_scaling", "token_scaling", "memory", "upcycle"),
)
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path[:0] = [str(RECIPES / name) for name in FOLDERS]
