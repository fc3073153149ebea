"""Memory layout of a site's constants for the Triton kernels: currently that of the reference."""

from tardis_fx.runtime.prepared import prepare as prepare
