"""The list of rows. It imports nothing, so that every virtual environment can read it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One peer's way to quantize all denoisers.

    Attributes:
        name: the row's folder in WORK/out, PEER-WHAT.
        peer: the project whose virtual environment, requirements file and script make it.
        label: its name in the table.
        format: of weights and activations.
        rank: of the low-rank branch; None if the method has none.
    """

    name: str
    peer: str
    label: str
    format: str
    rank: int | None = None


PEERS = ("llmcompressor", "auto-round", "torchao", "modelopt")
"""Left out are projects that keep activations in 16 bits (sdnq, gguf, bitsandbytes), and those that
do not load without a CUDA device (diffusers' own loader of nunchaku checkpoints).
"""

OURS = "tempoquant"

_SVDQUANT_RANKS = (2, 16, 32)
_EQUAL_BITS = (1, 10)
"""Our ranks whose bits, `deflation` included, are at most those of SVDQuant's ranks 2 and 16 at the
bundled width.
"""

ROWS = (
    Row("torchao-mxfp4", "torchao", "torchao, round to nearest", "mxfp4"),
    Row("torchao-nvfp4", "torchao", "torchao, static activation scale", "nvfp4"),
    Row("auto-round-mxfp4", "auto-round", "auto-round, round to nearest", "mxfp4"),
    Row("auto-round-nvfp4", "auto-round", "auto-round, round to nearest", "nvfp4"),
    *(Row(f"auto-round-mxfp4-svdquant-r{r}", "auto-round", "auto-round SVDQuant", "mxfp4", r) for r in _SVDQUANT_RANKS),
    Row("llmcompressor-nvfp4", "llmcompressor", "llmcompressor, round to nearest", "nvfp4"),
    Row("llmcompressor-nvfp4-gptq", "llmcompressor", "llmcompressor GPTQ", "nvfp4"),
    Row("llmcompressor-mxfp4-gptq", "llmcompressor", "llmcompressor GPTQ", "mxfp4"),
    Row("modelopt-nvfp4", "modelopt", "modelopt, max calibration", "nvfp4"),
    *(Row(f"modelopt-nvfp4-svdquant-r{r}", "modelopt", "modelopt SVDQuant", "nvfp4", r) for r in _SVDQUANT_RANKS),
    *(Row(f"modelopt-mxfp4-svdquant-r{r}", "modelopt", "modelopt SVDQuant", "mxfp4", r) for r in _SVDQUANT_RANKS),
    Row("tempoquant-mxfp4-rtn", OURS, "ours, rtn", "mxfp4"),
    Row("tempoquant-nvfp4-rtn", OURS, "ours, rtn", "nvfp4"),
    *(
        Row(f"tempoquant-{format}-{recipe}-r{rank}", OURS, f"ours, {recipe}", format, rank)
        for format in ("mxfp4", "nvfp4_m1", "nvfp4")
        for recipe in (("default",) if format == "nvfp4_m1" else ("svdquant", "paper", "default"))
        for rank in (*_EQUAL_BITS, *_SVDQUANT_RANKS)
        if rank not in _EQUAL_BITS or recipe == "default"
    ),
)


def row_named(name: str) -> Row:
    """Return the row of a name. Raises KeyError for an unknown one."""
    return {row.name: row for row in ROWS}[name]
