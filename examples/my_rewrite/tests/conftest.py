"""How many examples each property draws: ``pytest --hypothesis-profile quick`` for a first look."""

from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=20)
settings.register_profile("quick", deadline=None, max_examples=2, derandomize=True)
settings.load_profile("default")
