"""How many examples a property draws."""

from hypothesis import settings


def examples(plain: int) -> int:
    """A property's own number of examples under the plain profile of 20; others draw in proportion."""
    return plain * settings().max_examples // 20
