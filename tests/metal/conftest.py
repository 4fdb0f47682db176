"""Libraries that the emulator compiles are kept between runs where ATTNREWRITE_TEST_CACHE names a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def emulator_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = os.environ.get("ATTNREWRITE_TEST_CACHE") or str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNREWRITE_CACHE", folder)
        yield
