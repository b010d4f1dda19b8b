"""Processing of many tokens piece by piece, in smaller pieces once a GPU has run out of memory."""

import logging
from collections.abc import Callable

import torch

_logger = logging.getLogger(__name__)

DEFAULT_TOKENS = 4096
_FEWEST_TOKENS = 256


class TokenChunks:
    """The number of tokens to process at once.

    A sum over other pieces rounds differently: a run that had to halve them may choose other codes
    in rare places.

    Attributes:
        num_tokens: of one piece; falls if memory runs out, and stays there.
    """

    def __init__(self, num_tokens: int = DEFAULT_TOKENS) -> None:
        self.num_tokens = num_tokens

    def each(self, x: torch.Tensor, work: Callable[[torch.Tensor], None]) -> None:
        """Call `work` on consecutive rows of x: (tokens, …). If memory runs out, `work` changes
        nothing.

        Raises:
            torch.OutOfMemoryError: not even the smallest piece fits.
        """
        start = 0
        while start < x.shape[0]:
            piece = x[start : start + self.num_tokens]
            if self._fits(piece, work):
                start += piece.shape[0]
            else:
                torch.cuda.empty_cache()  # nothing here refers to the failed piece's memory any more

    def _fits(self, piece: torch.Tensor, work: Callable[[torch.Tensor], None]) -> bool:
        """Do the work and return True, or return False if it needs smaller pieces."""
        try:
            work(piece)
        except torch.OutOfMemoryError:
            if self.num_tokens <= _FEWEST_TOKENS:
                raise
            self.num_tokens = max(_FEWEST_TOKENS, self.num_tokens // 2)
            _logger.warning("the GPU ran out of memory; continuing with %d tokens at a time", self.num_tokens)
            return False
        return True
