"""Running a quantized model: linears as modules, their conversion, and the clock that sets their
timestep bin.
"""

from tempoquant.runtime.bin_clock import BinClock
from tempoquant.runtime.convert import install_layers, quantized_linears, replace_linears
from tempoquant.runtime.linear import QuantizedLinear

__all__ = ["BinClock", "QuantizedLinear", "install_layers", "quantized_linears", "replace_linears"]
