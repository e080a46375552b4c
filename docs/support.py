"""What can be saved and deployed, out of the tables that decide it, written into the README.

python docs/support.py
"""

from __future__ import annotations

import re
from pathlib import Path

from customized_models.adapters.peft_types import PEFT_TYPES
from customized_models.backends.opening import BUILT_IN
from customized_models.gguf.family import registered
from customized_models.models import QUANTIZATIONS

README = Path(__file__).parent.parent / "README.md"
PART = re.compile(r"(?<=<!-- from docs/support.py -->\n).*?(?=<!-- to here -->)", re.DOTALL)


def support() -> str:
    """The README's part, in Markdown."""
    mergeable = [kind.method for kind in PEFT_TYPES.values() if not kind.unmergeable]
    others = [kind.method for kind in PEFT_TYPES.values() if kind.unmergeable]
    classes = sorted(registered(), key=str.lower)
    rows = {
        f"**Adapters that can be saved** ({len(mergeable)} of PEFT's types)": sorted(
            mergeable, key=str.lower
        ),
        "Adapters that cannot, because they are not a change of weights": sorted(
            others, key=str.lower
        ),
        "**Deployment tools**": [f"`{name}`" for name in sorted(BUILT_IN)],
        "**Quantizations**": [f"`{name}`" for name in QUANTIZATIONS],
        f"**Architectures that can be deployed** ({len(classes)})": [f"`{c}`" for c in classes],
    }
    lines = [f"| {what} | {', '.join(names)} |" for what, names in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def with_support(readme: str) -> str:
    """The README's text, with that part as the tables are now."""
    return PART.sub(lambda _: support(), readme, count=1)


if __name__ == "__main__":
    README.write_text(with_support(README.read_text()))
