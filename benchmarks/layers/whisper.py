"""transformers' WhisperModel from the weights of a CTranslate2 model.bin, which names and fuses
linears its own way.
"""

import re
from pathlib import Path

import torch
from transformers import WhisperConfig, WhisperModel

from benchmarks.layers.ctranslate2_file import read_variables
from tempoquant.errors import ModelError

SPECIFICATION = "WhisperSpec"
NAME = re.compile(r"(?P<side>encoder|decoder)/(?:layer_(?P<layer>\d+)/)?(?P<module>.+)/(?P<parameter>\w+)")
PARAMETERS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
MODULES = {
    "conv1": ("conv1",),
    "conv2": ("conv2",),
    "position_encodings": ("embed_positions",),
    "embeddings": ("embed_tokens",),
    "layer_norm": ("layer_norm",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
"""The transformers modules of each CTranslate2 module: several if one fused linear holds their
rows, in this order.
"""


def load_whisper(file: Path) -> WhisperModel:
    """Build the model in float32, with sizes from its weights.

    Raises:
        ModelError: the file cannot be read, holds another kind of model, or not every weight of
            this one.
    """
    specification, tensors = read_variables(file)
    if specification != SPECIFICATION:
        raise ModelError(f"{file} holds a {specification}, and a {SPECIFICATION} is wanted.")
    try:
        state = dict(parameter for name, tensor in tensors.items() for parameter in _parameters(name, tensor))
        model = WhisperModel(_config(tensors)).eval()
        model.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"{file} does not hold the weights of a Whisper: {' '.join(str(error).split())}.") from error
    return model


def _parameters(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Convert one variable to transformers' parameters; none for a setting, or for the bias that
    keys do not have.
    """
    found = NAME.fullmatch(name)
    if found is None or found["module"] not in MODULES:
        return []
    modules = MODULES[found["module"]]
    prefix = found["side"] + (f".layers.{found['layer']}" if found["layer"] else "")
    parameters = [f"{prefix}.{module}.{PARAMETERS[found['parameter']]}" for module in modules]
    rows = zip(parameters, tensor.float().chunk(len(parameters)), strict=True)
    return [(parameter, values) for parameter, values in rows if not parameter.endswith("k_proj.bias")]


def _config(tensors: dict[str, torch.Tensor]) -> WhisperConfig:
    """Return the sizes, each from its tensor, without the padding token, which only training
    needs.
    """
    vocab_size, d_model = tensors["decoder/embeddings/weight"].shape
    sizes: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        found = [NAME.fullmatch(name) for name in tensors if name.startswith(side)]
        sizes[f"{side}_layers"] = len({match["layer"] for match in found if match and match["layer"]})
        sizes[f"{side}_ffn_dim"] = len(tensors[f"{side}/layer_0/ffn/linear_0/weight"])
        sizes[f"{side}_attention_heads"] = int(tensors[f"{side}/num_heads"])
    return WhisperConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_mel_bins=tensors["encoder/conv1/weight"].shape[1],
        max_source_positions=len(tensors["encoder/position_encodings/encodings"]),
        max_target_positions=len(tensors["decoder/position_encodings/encodings"]),
        pad_token_id=None,
        **sizes,
    )
