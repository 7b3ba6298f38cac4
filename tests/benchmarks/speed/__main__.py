"""`python tests/benchmarks/speed --help`; what it does stands in `command.py`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # where the package is, and not its own files
    from speed.command import main

    main()
