"""``tardis bench``: decoding, and what a user would run instead, timed in one process, with the bytes that bound it."""
