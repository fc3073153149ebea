"""The commands of ``tardis``."""
