"""What our functions are built of that Numba compiles, and where they are kept between processes.

Nothing here is imported where Numba is not installed.
"""

from __future__ import annotations

import importlib.util


def has_numba() -> bool:
    """Whether Numba is installed; it is not imported."""
    return importlib.util.find_spec("numba") is not None
