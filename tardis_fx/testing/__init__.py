"""A kit for testing rewrites: strategies that draw FFNs, graphs and calibration sets, assertions, and laws.

``python -m tardis_fx.testing NAME`` tries a registered rewrite against every law.

Raises:
    ImportError: Hypothesis is not installed.
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError("tardis_fx.testing needs Hypothesis: pip install 'tardis-fx[testing]'") from error

from tardis_fx.testing.assertions import (
    assert_equivalent,
    assert_error_within,
    assert_matches,
    assert_plan_roundtrip,
    rewritten,
)
from tardis_fx.testing.graphs import graphs
from tardis_fx.testing.laws import LAWS
from tardis_fx.testing.strategies import calibration_sets, sites, weights
from tardis_fx.testing.suite import examine

__all__ = [
    "LAWS",
    "assert_equivalent",
    "assert_error_within",
    "assert_matches",
    "assert_plan_roundtrip",
    "calibration_sets",
    "examine",
    "graphs",
    "rewritten",
    "sites",
    "weights",
]
