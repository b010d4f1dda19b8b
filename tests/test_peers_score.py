"""The scoring of a peer's files: each prompt counts once, and no missing one is ignored."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.peers.rows import PEERS, ROWS, Row
from benchmarks.peers.score import score_all, score_row
from tempoquant.errors import ModelError

ROW = Row("some-peer-nvfp4", "some-peer", "some peer", "nvfp4", 2)
PROMPT_IDS = {"high_noise": ["a", "a", "b", "b"], "low_noise": ["a", "b"]}
ERROR = {"a": 0.1, "b": 0.01}
"""Amplitude of the error over the signal's: 20 dB and 40 dB."""


def write(file: Path, **tensors: torch.Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Make two held-out prompts, one quantized twenty decibels better than the other."""
    out = tmp_path / "out" / ROW.name
    for denoiser, prompt_ids in PROMPT_IDS.items():
        for index, prompt_id in enumerate(prompt_ids):
            name = f"{index:04}.safetensors"
            answer = torch.randn(1, 16, 2, 4, 4)
            call = {"noise_prediction": answer, "timestep": torch.tensor([900.0]), "hidden_states": torch.zeros(1)}
            write(tmp_path / "held_out" / denoiser / name, **call)
            write(out / "predictions" / denoiser / name, noise_prediction=answer * (1 + ERROR[prompt_id]))
    for index, error in enumerate(ERROR.values()):
        latent = torch.randn(1, 16, 2, 4, 4)
        write(tmp_path / "generations" / f"{index:04}.safetensors", final_latent=latent)
        write(out / "latents" / f"{index:04}.safetensors", final_latent=latent * (1 + error))
    (tmp_path / "job.json").write_text(json.dumps({"held_out": PROMPT_IDS}))
    (out / "row.json").write_text(json.dumps({"row": ROW.label, "format": "nvfp4", "rank": 2}))
    return tmp_path


def test_each_prompt_counts_once_however_many_calls_it_has(work: Path):
    sqnr_db = score_row(work, ROW)["sqnr_db"]
    for key in ("high_noise", "low_noise", "final_latent"):
        assert sqnr_db[key]["mean"] == pytest.approx(30, abs=1e-3)  # of 20 and 40 dB
        assert sqnr_db[key]["standard_error"] == pytest.approx(10, abs=1e-3)
        assert sqnr_db[key]["n"] == 2


def test_a_failed_row_says_why_and_has_no_figures(work: Path):
    (work / "out" / ROW.name / "row.json").write_text(json.dumps({"row": ROW.label, "error": "ValueError: no"}))
    record = score_row(work, ROW)
    assert record["error"] == "ValueError: no" and "sqnr_db" not in record


@pytest.mark.parametrize("missing", ["predictions/low_noise/0001.safetensors", "latents/0000.safetensors"])
def test_a_missing_answer_is_an_error_and_not_left_out(work: Path, missing: str):
    (work / "out" / ROW.name / missing).unlink()
    with pytest.raises(ModelError, match="is missing: make the row again"):
        score_row(work, ROW)


def test_rows_that_were_not_made_are_left_out(work: Path):
    other = Row("other", "some-peer", "other", "mxfp4")
    assert [record["name"] for record in score_all(work, (other, ROW))] == [ROW.name]


def test_every_row_is_some_peers_and_every_peer_has_requirements_that_are_pinned():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.peer for row in ROWS} == {*PEERS, "tempoquant"}
    for peer in PEERS:
        folder = Path(__file__).parent.parent / "benchmarks" / "peers"
        assert (folder / f"run_{peer.replace('-', '_')}.py").is_file()
        lines = (folder / f"requirements-{peer}.txt").read_text().split()
        assert all("==" in line for line in lines) and any(line.startswith("torch==") for line in lines)
