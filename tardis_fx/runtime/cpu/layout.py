"""How the constants of a site lie in memory for ``kernel.cpp``: today as the reference reads them."""

from tardis_fx.runtime.prepared import prepare as prepare
