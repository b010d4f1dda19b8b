"""Training of the text encoder on prompts alone, so that each colour word's embedding already holds
the object's motion.

    python -m training.text

Linear probes on the colour word's hidden state must name the object's colour, shape and motion. The
probes are discarded. Once the words of an object are gathered in one token, the experts only look
up "my colour" to know their motion; that halves their task. One to two minutes; ends with
runs/text/{tokenizer,text_encoder}.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from tempoquant.tiny.world import COLORS, DIRECTIONS, MOTIONS, SHAPES, SPEEDS, STILL
from training.architecture import TEXT_WIDTH, build_text_encoder
from training.checkpoints import RUNS, append_log

FOLDER = RUNS / "text"
SEED = 2
NUM_STEPS = 1500
BATCH_SIZE = 64
WORDS = ("a", "and", "moves", "stays", STILL, *COLORS, *SHAPES, *DIRECTIONS, *SPEEDS)
TASKS = {"color": len(COLORS), "shape": len(SHAPES), "motion": len(MOTIONS)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a word; `</s>` ends every prompt, the empty one too, as in
    UMT5's tokenizer.
    """
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def random_prompt(rng: np.random.Generator) -> tuple[str, list[tuple[int, int, int]]]:
    """Draw a prompt of one or two objects, any combination; and (colour, shape, motion) of each as
    class indices.
    """
    labels, parts = [], []
    for color in rng.permutation(len(COLORS))[: int(rng.integers(1, 3))]:
        shape, motion = int(rng.integers(len(SHAPES))), int(rng.integers(len(MOTIONS)))
        direction, speed = MOTIONS[motion]
        deed = f"moves {direction} {speed}" if speed else "stays still"
        parts.append(f"a {list(COLORS)[int(color)]} {SHAPES[shape]} {deed}")
        labels.append((int(color), shape, motion))
    return " and ".join(parts), labels


def probe_batch(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return hidden states at the colour words, (objects, width), and their labels, (objects,
    3).
    """
    prompts, labels = zip(*(random_prompt(rng) for _ in range(BATCH_SIZE)), strict=True)
    tokens = tokenizer(list(prompts), padding=True, return_tensors="pt")
    hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    color_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(COLORS)))
    at_colors = torch.isin(tokens.input_ids, color_ids)
    return hidden[at_colors], torch.tensor([label for prompt in labels for label in prompt])


def train(num_steps: int) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """Train and return the pair. Logs the probes' accuracy on prompts not seen in the same
    batch.
    """
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(len(tokenizer))
    probes = nn.ModuleDict({task: nn.Linear(TEXT_WIDTH, classes) for task, classes in TASKS.items()})
    optimizer = torch.optim.AdamW([*encoder.parameters(), *probes.parameters()], lr=1e-3)
    start = time.monotonic()
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 50, 2.0 * (1.0 - step / num_steps) + 0.01)
        states, labels = probe_batch(tokenizer, encoder, np.random.default_rng([SEED, step]))
        logits = [probe(states) for probe in probes.values()]
        loss = sum(F.cross_entropy(logit, labels[:, i]) for i, logit in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step + 1 == num_steps:
            accuracy = {
                f"{task}_accuracy": round(float((logit.argmax(1) == labels[:, i]).float().mean()), 4)
                for i, (task, logit) in enumerate(zip(TASKS, logits, strict=True))
            }
            seconds = round(time.monotonic() - start, 1)
            append_log("text", {"step": step, "seconds": seconds, "loss": round(float(loss.detach()), 4), **accuracy})
    return tokenizer, encoder.eval()


def save(tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, folder: Path = FOLDER) -> None:
    """Write both in the layout the pipeline reads."""
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().num_threads)
    save(*train(NUM_STEPS))


if __name__ == "__main__":
    main()
