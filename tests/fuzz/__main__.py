"""Makes ``python tests/fuzz`` run :mod:`fuzz.hunt`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # for `fuzz` and `builders`

if __name__ == "__main__":
    import typer

    from fuzz.hunt import main

    typer.run(main)
