"""Runs the command ``tardis`` as ``python -m tardis_fx``."""

from tardis_fx.cli.main import main

if __name__ == "__main__":
    main()
