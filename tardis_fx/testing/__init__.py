"""What tests of a rewrite are made of: strategies that draw FFNs, graphs and calibration sets, assertions, and laws.

``python -m tardis_fx.testing NAME`` tries a registered rewrite against every law.

Raises:
    ImportError: Hypothesis is not installed.
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError("tardis_fx.testing needs Hypothesis: pip install 'tardis-fx[testing]'") from error
