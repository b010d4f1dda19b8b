"""llmcompressor: rounding to nearest with its observers, and GPTQ, in the W4A4 presets of
compressed-tensors.

`oneshot` wants a transformers model. What it does with one, a session, a modifier and calibration
calls, is done here in the order of its "basic" pipeline, on a diffusers model.
"""

from llmcompressor.core import LifecycleCallbacks, active_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.utils.helpers import DisableQuantization

from benchmarks.peers.wan_peer import Quantized, Storage, Task, block_linears, replay, run_peer

_NOTE = "all blocks calibrated on 16-bit inputs (its basic pipeline)"


def quantize(task: Task) -> Quantized:
    """Apply one modifier to the block linears; the model then quantizes weights and activations in
    every call.
    """
    model, row = task.model, task.row
    linears = block_linears(model)
    storage = Storage()
    for linear in linears.values():
        # NVFP4 has a float32 scale for the weight and one for the activations.
        storage.add((linear.out_features, linear.in_features), row, once=64 if row.format == "nvfp4" else 0)
    scheme, targets = row.format.upper(), list(linears)
    if row.name.endswith("gptq"):
        modifier = GPTQModifier(targets=targets, scheme=scheme, batched_quantization=None)
    else:
        modifier = QuantizationModifier(targets=targets, scheme=scheme)
    session = active_session()
    session.reset()
    session.initialize(model=model, start=-1, recipe=modifier)
    LifecycleCallbacks.calibration_start()
    with DisableQuantization(model):
        replay(model, task.calls)
    LifecycleCallbacks.sequential_epoch_end(list(model.modules()))
    LifecycleCallbacks.calibration_end()
    session.finalize()
    return Quantized(model, storage, _NOTE)


if __name__ == "__main__":
    run_peer(quantize, ["llmcompressor", "compressed-tensors"])
