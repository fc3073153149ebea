"""The contract of a rewrite, and everything that a rewrite outside of this package imports.

Each rewrite is a module of this package.
"""

from tardis_fx.config import Config, one_of
from tardis_fx.errors import CalibrationError, ConfigError, RewriteError, TardisError
from tardis_fx.graph.feed_forward import BIASES, biases, dense, feed_forward, linear, matrices, multiply, narrowed
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit, Run, changed, steps
from tardis_fx.observation.site import Merge, ObservedSite
from tardis_fx.passes.base import Rewrite, matrices_of, stored_bytes, with_errors
from tardis_fx.passes.layout import Expected, Layout, coded_rows, codes, indices, like, setting, table_rows
from tardis_fx.passes.matrix_forms import Coded, CodedRows, Dense, Factored, Form, Int8, Masked
from tardis_fx.passes.represented import Represented
from tardis_fx.passes.static import Choice, StaticRewrite, bias_bytes, measured
from tardis_fx.plan import KeptSite, Planned, SitePlan
from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.neurons import Neurons
from tardis_fx.statistics.operands import ColumnNorms, Grams, Operands
from tardis_fx.statistics.surrogates import Sums, SurrogateSums

__all__ = [
    "BIASES",
    "CalibrationError",
    "Choice",
    "Coded",
    "CodedRows",
    "ColumnNorms",
    "Config",
    "ConfigError",
    "Dense",
    "Expected",
    "Factored",
    "Fit",
    "Form",
    "Grams",
    "Int8",
    "KeptSite",
    "Layout",
    "Masked",
    "Merge",
    "Moments",
    "Neurons",
    "ObservedSite",
    "Operands",
    "Planned",
    "Represented",
    "Rewrite",
    "RewriteError",
    "Run",
    "Site",
    "SitePlan",
    "SiteWeights",
    "StaticRewrite",
    "Sums",
    "SurrogateSums",
    "TardisError",
    "bias_bytes",
    "biases",
    "changed",
    "coded_rows",
    "codes",
    "dense",
    "feed_forward",
    "indices",
    "like",
    "linear",
    "matrices",
    "matrices_of",
    "measured",
    "multiply",
    "narrowed",
    "one_of",
    "setting",
    "steps",
    "stored_bytes",
    "table_rows",
    "with_errors",
]  # fmt: skip
