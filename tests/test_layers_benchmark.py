"""Laws of the layers benchmark: a CTranslate2 file is read as it was written, or refused in one
sentence.
"""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperModel

from benchmarks.layers import speech
from benchmarks.layers.__main__ import main
from benchmarks.layers.ctranslate2_file import read_variables
from benchmarks.layers.layer import Layer, reading
from benchmarks.layers.measure import error_of
from benchmarks.layers.whisper import load_whisper
from tempoquant.errors import ModelError
from tempoquant.recipe import Recipe

DTYPE_IDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
ARRAYS = {
    "encoder/weight": np.arange(6, dtype=np.float16).reshape(2, 3) / 8,
    "encoder/bias": np.array([1.5, -2.0, 3e-8], np.float32),
    "decoder/num_heads": np.array(6, np.int16),
    "decoder/pre_norm": np.array(1, np.int8),
    "decoder/lengths": np.array([[2**31 - 1], [-(2**31)]], np.int32),
}
ALIASES = {"decoder/weight": "encoder/weight"}


def as_text(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def as_bytes(
    arrays: Mapping[str, np.ndarray], aliases: Mapping[str, str] = {}, name: str = "Spec", version: int = 6
) -> bytes:
    written = [struct.pack("<I", version), as_text(name), struct.pack("<II", 3, len(arrays))]
    for variable, array in arrays.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        written += [as_text(variable), shape, struct.pack("<BI", DTYPE_IDS.get(array.dtype.name, 9), array.nbytes)]
        written += [array.tobytes()]
    written += [struct.pack("<I", len(aliases)), *(as_text(text) for pair in aliases.items() for text in pair)]
    return b"".join(written)


def assert_refused(file: Path, what: str) -> None:
    with pytest.raises(ModelError) as refusal:
        read_variables(file)
    message = str(refusal.value)
    assert what in message and message.startswith(str(file))
    assert message.endswith(".") and ". " not in message and "\n" not in message


def test_every_variable_comes_back_in_its_shape_and_dtype_and_under_its_alias(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(as_bytes(ARRAYS, ALIASES))
    specification, tensors = read_variables(file)
    assert specification == "Spec" and tensors.keys() == ARRAYS.keys() | ALIASES.keys()
    for name, tensor in tensors.items():
        array = ARRAYS[ALIASES.get(name, name)]
        assert tensor.numpy().dtype == array.dtype and tensor.shape == array.shape
        assert np.array_equal(tensor.numpy(), array)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    file, whole = tmp_path / "model.bin", as_bytes(ARRAYS, ALIASES)
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert_refused(file, "cut off")


@pytest.mark.parametrize(("damaged", "what"), [
    (as_bytes(ARRAYS, ALIASES) + b"\0", "goes on after its end"),
    (as_bytes(ARRAYS, version=5), "no CTranslate2 model of version 6"),
    (as_bytes({"x": np.zeros(2, np.float64)}), "x in dtype 9"),
    (as_bytes({"x": np.zeros(2, np.int16)}).replace(struct.pack("<BI", 2, 4), struct.pack("<BI", 2, 3)), "x 3 bytes"),
    (as_bytes(ARRAYS, {"y": "nowhere"}), "the same as nowhere"),
    (as_bytes({"x": np.zeros(2, np.int8)}).replace(b"x\0", b"\xff\0"), "not UTF-8"),
], ids=["longer", "version", "dtype", "size", "alias", "name"])  # fmt: skip
def test_a_damaged_file_is_refused(damaged, what, tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(damaged)
    assert_refused(file, what)


@pytest.fixture(scope="module")
def original() -> WhisperModel:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=20, d_model=8, num_mel_bins=4, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=12, decoder_ffn_dim=16, max_source_positions=6,
        max_target_positions=5, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    model = WhisperModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def ctranslate2_arrays(model: WhisperModel) -> dict[str, np.ndarray]:
    """Write CTranslate2's arrays: linears that read one input as one, and a bias of zero for
    keys.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    arrays = {f"encoder/conv{i}/{p}": state[f"encoder.conv{i}.{p}"] for i in (1, 2) for p in ("weight", "bias")}
    arrays["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]

    def put(name: str, *sources: str, parameters: tuple[str, str] = ("weight", "bias")) -> None:
        for parameter, ours in zip(parameters, ("weight", "bias"), strict=True):
            parts = [state.get(f"{source}.{ours}", torch.zeros(model.config.d_model)) for source in sources]
            arrays[f"{name}/{parameter}"] = torch.cat(parts)

    for side in ("encoder", "decoder"):
        arrays[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        arrays[f"{side}/num_heads"] = torch.tensor(getattr(model.config, f"{side}_attention_heads"), dtype=torch.int16)
        put(f"{side}/layer_norm", f"{side}.layer_norm", parameters=("gamma", "beta"))
        for layer in range(getattr(model.config, f"{side}_layers")):
            to, of = f"{side}/layer_{layer}", f"{side}.layers.{layer}"
            put(f"{to}/ffn/layer_norm", f"{of}.final_layer_norm", parameters=("gamma", "beta"))
            put(f"{to}/ffn/linear_0", f"{of}.fc1")
            put(f"{to}/ffn/linear_1", f"{of}.fc2")
            put(f"{to}/self_attention/layer_norm", f"{of}.self_attn_layer_norm", parameters=("gamma", "beta"))
            put(f"{to}/self_attention/linear_0", *(f"{of}.self_attn.{x}_proj" for x in "qkv"))
            put(f"{to}/self_attention/linear_1", f"{of}.self_attn.out_proj")
            if side == "decoder":
                put(f"{to}/attention/layer_norm", f"{of}.encoder_attn_layer_norm", parameters=("gamma", "beta"))
                put(f"{to}/attention/linear_0", f"{of}.encoder_attn.q_proj")
                put(f"{to}/attention/linear_1", *(f"{of}.encoder_attn.{x}_proj" for x in "kv"))
                put(f"{to}/attention/linear_2", f"{of}.encoder_attn.out_proj")
    return {name: tensor.numpy() for name, tensor in arrays.items()}


def test_a_whisper_from_ctranslate2s_file_computes_what_the_original_does(original, tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(as_bytes(ctranslate2_arrays(original), name="WhisperSpec"))
    loaded, heard, read = load_whisper(file), torch.randn(1, 4, 12), torch.tensor([[3, 1, 7]])
    with torch.no_grad():
        outputs = [model(input_features=heard, decoder_input_ids=read)[0] for model in (original, loaded)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["decoder/embeddings/weight", "encoder/layer_1/ffn/linear_1/bias"])
def test_a_whisper_that_lacks_a_weight_is_refused(name, original, tmp_path):
    file, arrays = tmp_path / "model.bin", ctranslate2_arrays(original)
    del arrays[name]
    file.write_bytes(as_bytes(arrays, name="WhisperSpec"))
    with pytest.raises(ModelError, match="does not hold the weights of a Whisper"):
        load_whisper(file)


def test_another_kind_of_model_is_no_whisper(original, tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(as_bytes(ctranslate2_arrays(original), name="TransformerSpec"))
    with pytest.raises(ModelError, match="TransformerSpec"):
        load_whisper(file)


def test_without_espeak_the_command_names_the_line_that_installs_it_and_reads_nothing(monkeypatch):
    monkeypatch.setattr(speech.shutil, "which", lambda _: None)
    monkeypatch.setattr("sys.argv", ["layers", "no-such-text-encoder", "no-such-speech-recognizer"])
    with pytest.raises(SystemExit, match="apt-get install espeak-ng"):
        main()


def test_the_worst_token_is_worse_than_all_together_and_silence_is_not_held_against_itself():
    torch.manual_seed(0)
    fit, test = torch.randn(64, 32), torch.randn(64, 32)
    test[5] = 0
    error = error_of(Layer(torch.nn.Linear(32, 16), fit, test), Recipe.load("rtn"))
    assert error.all_db < error.worst_token_db < 0


def test_layers_are_read_inside_the_block_only():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    inside, outside = torch.randn(2, 3, 4), torch.randn(5, 4)
    with reading(model, ["0"]) as seen:
        model(inside)
    model(outside)
    assert [tensor.shape for tensor in seen["0"]] == [(6, 4)]
    assert torch.equal(seen["0"][0], inside.flatten(0, 1))
