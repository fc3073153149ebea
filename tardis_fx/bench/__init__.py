"""``tardis bench``: times decoding and its alternatives in one process, with the bytes that bound it."""
