"""A folder with two quantized denoisers and nothing else: enough for `inspect`, not enough to
generate.
"""

from pathlib import Path

from tempoquant.checkpoint import ComponentWriter
from tempoquant.timesteps import TimestepBins
from tests import quantized_wan
from tests.random_layers import by_bin

COMPONENTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
BINS = {"high_noise": quantized_wan.BINS, "low_noise": TimestepBins((500.0,))}
KEPT_16BIT = "blocks.1.ffn.net.2"


def write_quantized_folder(folder: Path, format: str = "mixed") -> Path:
    """Quantize all denoisers from random weights, except one linear each, which stays in 16
    bits.
    """
    for seed, (denoiser, component) in enumerate(COMPONENTS.items()):
        model = quantized_wan.tiny_wan(seed)
        layers = quantized_wan.quantize_all(model, format, bins=BINS[denoiser])
        del layers[KEPT_16BIT]
        layers["blocks.0.ffn.net.2"] = by_bin(layers["blocks.0.ffn.net.2"])
        with ComponentWriter(
            folder / component, denoiser=denoiser, bins=BINS[denoiser], recipe=quantized_wan.RECIPE
        ) as writer:
            for name, layer in layers.items():
                writer.add_layer(name, layer)
            for name, tensor in model.state_dict().items():
                if name.rpartition(".")[0] not in layers:
                    writer.add_tensor(name, tensor)
            writer.finish(
                {"_class_name": "WanTransformer3DModel"},
                calibration=quantized_wan.CALIBRATION,
                notes=("a note",) if denoiser == "low_noise" else (),
            )
    return folder
