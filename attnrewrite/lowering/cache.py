"""Where this package keeps what it can fetch or measure again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """ATTNREWRITE_CACHE, or ~/.cache/attnrewrite; the first use creates it."""
    return Path(os.environ.get("ATTNREWRITE_CACHE") or Path.home() / ".cache" / "attnrewrite")
