"""``python -m tardis_fx`` is the command ``tardis``."""

from tardis_fx.cli.main import main

if __name__ == "__main__":
    main()
