"""Random spellings of local attention, and random near misses of them."""
