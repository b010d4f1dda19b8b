"""Registers our checkpoints with diffusers as soon as it is imported, before or after this package,
and imports neither.

diffusers has no entry point for quantizers, so registering adds to its dictionaries. The entries
are light at first: reading the first quantized config imports the loader, which replaces them. So
`tempoquant --help`, and a program that loads no checkpoint, wait for neither torch nor diffusers.
"""

from typing import Any

import wrapt

_METHOD = "tempoquant"
"""checkpoint.schema's QUANT_METHOD, which this module may not import: that imports torch."""


class DeferredConfig:
    """A placeholder for `hosts.diffusers.loader.TempoQuantConfig` in diffusers' dictionary until a
    config is read.
    """

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Import the loader, replace this class by it, and let it read the config."""
        from tempoquant.hosts.diffusers.loader import TempoQuantConfig, register

        register()
        return TempoQuantConfig.from_dict(*args, **kwargs)


def register_on_import() -> None:
    """Register with diffusers when it is imported, or at once if it is imported already."""
    wrapt.register_post_import_hook(_register, "diffusers.quantizers.auto")


def _register(auto: Any) -> None:
    # diffusers asks for the config first, and only then, by the same key, for the quantizer.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(_METHOD, DeferredConfig)
