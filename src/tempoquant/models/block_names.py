"""Names of a block's modules by a table, in any spelling: with dots, or flat with underscores."""

import re
from collections.abc import Callable, Mapping


def by_table(in_block: Mapping[str, str], block: str, outside: str) -> Callable[[str], str | None]:
    """Return a function from any known name of a module to diffusers' own; it returns None for an
    unknown name.

    Args:
        in_block: other names of a module in a block to diffusers'; both are accepted.
        block: regular expression of a list of blocks, flat ("blocks" of "blocks_3_attn");
            diffusers' own list is `transformer_blocks`.
        outside: regular expression of the modules outside the blocks, whose names stay.
    """
    flat = {name.replace(".", "_"): own for theirs, own in in_block.items() for name in (theirs, own)}
    in_list, outer = re.compile(rf"(?:{block})_([0-9]+)_(.+)"), re.compile(rf"(?:{outside})(\..+)?")

    def own_name(module: str) -> str | None:
        if outer.fullmatch(module):
            return module
        found = in_list.fullmatch(module.replace(".", "_"))
        part = found and flat.get(found[2])
        return part and found and f"transformer_blocks.{int(found[1])}.{part}"

    return own_name
