"""The emulator's libraries are kept as tests/metal keeps them."""

from tests.metal.conftest import emulator_cache  # noqa: F401
