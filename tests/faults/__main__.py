"""`python tests/faults kill|corrupt|machine|fuzz|table ...`; see docs/reliability.md."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from faults.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
