"""GPUs by the names that drivers and people give them: which words are one card's, and which make
it another.
"""

import re
from collections.abc import Mapping

_ANY_NVIDIA = ("nvidia", "gpu")
_GEFORCE = (*_ANY_NVIDIA, "geforce", "rtx")

CARDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "RTX 3090": ("3090", (*_GEFORCE, "24 gb")),
    "RTX 4090": ("4090", (*_GEFORCE, "24 gb")),
    "RTX 5090": ("5090", (*_GEFORCE, "32 gb")),
    "L40S": ("l 40 s", (*_ANY_NVIDIA, "48 gb")),
    "RTX PRO 6000": (
        "pro 6000",
        (*_ANY_NVIDIA, "rtx", "blackwell", "workstation edition", "server edition", "96 gb"),
    ),
    "A100 80 GB": ("a 100", (*_ANY_NVIDIA, "sxm", "sxm 4", "80 gb")),
    "H100 SXM": ("h 100", (*_ANY_NVIDIA, "sxm", "sxm 5", "80 gb", "hbm 3")),
    "H200": ("h 200", (*_ANY_NVIDIA, "sxm", "sxm 5", "141 gb", "hbm 3 e")),
    "B200": ("b 200", (*_ANY_NVIDIA, "sxm", "180 gb", "192 gb", "hbm 3 e")),
}
"""By a card's name: the words that each of its names has, and all that may be beside them. Any
other word names another card: PCIe, NVL, Laptop, D, Ti, SUPER, Max-Q, MIG, another size of memory.
"""


def is_name_of(text: str, card: str) -> bool:
    """Tell whether a text, such as torch's name of a device, names a card of `CARDS`.

    Letters and digits count, in either case: "rtx-4090" and "NVIDIA GeForce RTX 4090" are one card.
    """
    core, others = CARDS[card]
    words = " ".join(re.findall(r"[^\W\d_]+|\d+", text.lower()))
    allowed = "|".join((core, *others))
    return f" {core} " in f" {words} " and re.fullmatch(f"(?:(?:{allowed}) )+", f"{words} ") is not None
