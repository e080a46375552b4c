"""Where the servers that tests build lie: outside the repository, kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def directory() -> Path:
    """$CUSTOMIZED_MODELS_SERVERS, else a directory below $XDG_CACHE_HOME or ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("CUSTOMIZED_MODELS_SERVERS") or cache / "customized-models-servers")
