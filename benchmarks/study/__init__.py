"""The paper's tables in miniature: settings, plan, workers, and what each job of the plan does."""

import sys
from pathlib import Path

# The scripts of the examples are called, not rewritten.
EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples" / "vggt")
if EXAMPLES not in sys.path:
    sys.path.insert(0, EXAMPLES)
