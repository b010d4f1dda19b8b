"""The speech recognizer: Whisper tiny.en (384 features), its encoder and decoder, with few tokens
to calibrate on.

Few tokens are the hard case. In the last feed-forward of the encoder, behind its GELU, features
that are silent in all of them are loud in tokens held out.
"""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from benchmarks.layers.layer import PARTS, Layer, reading
from benchmarks.layers.speech import SAMPLING_RATE, clips
from benchmarks.layers.whisper import load_whisper
from tempoquant.errors import CalibrationError

ENCODER_LINEARS = ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")
DECODER_LINEARS = (
    "self_attn.q_proj",
    "self_attn.out_proj",
    "encoder_attn.q_proj",
    "encoder_attn.out_proj",
    "fc1",
    "fc2",
)
ENCODER_LAYERS, DECODER_LAYERS = (0, 1, 2, 3), (1, 3)
NUM_TOKENS = 576  # of each part
PROMPT = "<|startoftranscript|><|notimestamps|>"


@torch.no_grad()
def speech_recognizer(folder: Path) -> dict[str, Layer]:
    """Let a Whisper (model.bin, tokenizer.json) hear speech and read its text; return the inputs of
    the chosen linears.
    """
    model = load_whisper(folder / "model.bin")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    features_of = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    names = [f"encoder.layers.{layer}.{linear}" for layer in ENCODER_LAYERS for linear in ENCODER_LINEARS]
    names += [f"decoder.layers.{layer}.{linear}" for layer in DECODER_LAYERS for linear in DECODER_LINEARS]
    seen = {}
    for part in PARTS:
        with reading(model, names) as seen[part]:
            for clip in clips(part):
                heard = features_of(clip.sound, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
                read = tokenizer(f"{PROMPT} {clip.words}", add_special_tokens=False, return_tensors="pt").input_ids
                model(input_features=heard, decoder_input_ids=read)
    return {
        name: Layer(model.get_submodule(name), *(_evenly(torch.cat(seen[part][name])) for part in PARTS))
        for name in names
    }


def _evenly(tokens: torch.Tensor) -> torch.Tensor:
    """Take NUM_TOKENS tokens, evenly spaced: (NUM_TOKENS, in). Raises CalibrationError if there are
    fewer.
    """
    if len(tokens) < NUM_TOKENS:
        raise CalibrationError(f"the speech gives {len(tokens)} tokens of the {NUM_TOKENS} wanted: add clips.")
    return tokens[torch.linspace(0, len(tokens) - 1, NUM_TOKENS).round().long()]
