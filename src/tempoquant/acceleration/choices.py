"""The user's choices, and their contradictions, found before a weight is loaded."""

from dataclasses import dataclass

from tempoquant.acceleration.cache_settings import CACHES, CacheSettings
from tempoquant.acceleration.speeds import DEFAULTS, SPEEDS, Speed
from tempoquant.errors import SettingsError, UnsupportedError

NO_CACHE = "none"
_IN_CHUNKS = (
    "--compile needs blocks that compute all tokens in one piece (--in-one-piece), and these compute in chunks or have "
    "hooks of their own: leave --compile out, or compute in one piece."
)


@dataclass(frozen=True)
class Choices:
    """A speed, and the user's choices in place of its own.

    Attributes:
        speed: "exact", "fast" or "fastest".
        attention: a backend of diffusers; None for the table's.
        asked_cache: a cache by name, settings of one, "none", or None for the speed's.
        asked_compile: True, False, or None for wherever it is possible.

    Raises:
        SettingsError: there is no such speed or cache.
    """

    speed: Speed
    attention: str | None = None
    asked_cache: CacheSettings | str | None = None
    asked_compile: bool | None = None

    def __post_init__(self) -> None:
        if self.speed not in SPEEDS:
            raise SettingsError(f"a speed is one of {', '.join(SPEEDS)}, not {self.speed!r}.")
        if isinstance(self.asked_cache, str) and self.asked_cache not in (*CACHES, NO_CACHE):
            raise SettingsError(f"a cache is one of {', '.join((*CACHES, NO_CACHE))}, not {self.asked_cache!r}.")

    def __str__(self) -> str:
        """Describe the choices, such as "fast: magcache (…), attention sage"."""
        parts = ["no step cache" if self.cache is None else str(self.cache)]
        parts += [] if self.attention is None else [f"attention {self.attention}"]
        parts += [] if self.asked_compile is None else ["compiled" if self.asked_compile else "not compiled"]
        return f"{self.speed}: {', '.join(parts)}"

    @property
    def cache(self) -> CacheSettings | None:
        """Return the settings of the step cache; None for none."""
        if isinstance(self.asked_cache, CacheSettings):
            return self.asked_cache
        own = DEFAULTS[self.speed].cache
        if self.asked_cache is None or (own is not None and own.name == self.asked_cache):
            return own
        return None if self.asked_cache == NO_CACHE else BY_NAME[self.asked_cache]

    def require_possible(self, memory: str | None, in_chunks: bool = False) -> None:
        """Raise UnsupportedError for choices that cannot be combined, by name.

        Args:
            memory: the memory mode, or None.
            in_chunks: whether blocks will compute a chunk of tokens at a time.
        """
        if self.asked_compile and memory == "lean":
            raise UnsupportedError(
                "--compile and --memory lean cannot be combined: lean brings each block's weights by a hook in its "
                "forward, which compilation would bypass. Use --memory swap, or leave --compile out."
            )
        if self.asked_compile and memory == "disk":
            raise UnsupportedError(
                "--compile and --memory disk cannot be combined: disk reads each block's weights anew before it runs. "
                "Use --memory swap, or leave --compile out."
            )
        if self.asked_compile and in_chunks:
            raise UnsupportedError(_IN_CHUNKS)
        if self.asked_compile and self.cache is not None and self.cache.name == "taylorseer":
            raise UnsupportedError(
                "--compile and --cache taylorseer cannot be combined: its hook lies on blocks and output at once. Use "
                "--cache magcache, or leave --compile out."
            )

    def compiling(self, device_type: str, memory: str | None, has_plain_blocks: bool) -> tuple[bool, str]:
        """Return whether blocks are compiled, and the reason.

        Raises:
            UnsupportedError: the user asked for it, and blocks compute in chunks.
        """
        if self.asked_compile and not has_plain_blocks:
            raise UnsupportedError(_IN_CHUNKS)
        if self.asked_compile is not None:
            return self.asked_compile, "the user asked for it" if self.asked_compile else "the user declined it"
        if self.speed == "exact":
            return False, "speed exact adds and multiplies in the order in which PyTorch does by itself"
        if device_type != "cuda":
            return False, "on a CPU compiling takes longer than a short video gains"
        if memory in ("lean", "disk") or not has_plain_blocks:
            return False, "blocks compute in chunks of tokens, or their weights come by hooks"
        if self.cache is not None and self.cache.name == "taylorseer":
            return False, "taylorseer's hooks stand in the way"
        return True, "the same code runs for every block, so one compilation serves all"


BY_NAME = {
    "magcache": CacheSettings("magcache", threshold=0.06, max_skip_steps=2),
    "firstblock": CacheSettings("firstblock", threshold=0.05),
    "taylorseer": CacheSettings("taylorseer", interval=3),
}
"""The settings for a cache's name alone, if the speed has another one."""
