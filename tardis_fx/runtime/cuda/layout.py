"""How the constants of a site lie in memory for the Triton kernels: today as the reference reads them."""

from tardis_fx.runtime.prepared import prepare as prepare
