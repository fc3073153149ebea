"""The rewrites, one file each, on the contract in :mod:`tardis_fx.passes.base`."""
