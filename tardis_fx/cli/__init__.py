"""The command ``tardis``."""
