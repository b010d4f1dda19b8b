"""The text that a user may write behind --lora."""

from pathlib import Path

import pytest
import typer

from tempoquant.cli.lora_options import parse_loras


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c,d", "e:f", "g:1", "two", "two:0.5", "p", "q", "p,q"):
        Path(name).touch()


@pytest.mark.parametrize(
    ("texts", "high", "low"),
    [
        (["high_noise=a"], [("a", 1.0)], None),
        (["high_noise=a:0.8,b", "low_noise=b:-1e-1"], [("a", 0.8), ("b", 1.0)], [("b", -0.1)]),
        (["high_noise=a", "high_noise=b:2"], [("a", 1.0), ("b", 2.0)], None),
        (["high_noise=c,d:0.5,e:f,a"], [("c,d", 0.5), ("e:f", 1.0), ("a", 1.0)], None),
        (["low_noise=g:1"], None, [("g:1", 1.0)]),
        (["low_noise=g:1:3"], None, [("g:1", 3.0)]),
    ],
)  # fmt: skip
def test_files_and_strengths_are_read(
    files: None, texts: list[str], high: list[tuple[str, float]] | None, low: list[tuple[str, float]] | None
) -> None:
    wanted = {
        denoiser: [(Path(file), strength) for file, strength in found]
        for denoiser, found in (("high_noise", high), ("low_noise", low)) if found is not None
    }  # fmt: skip
    assert parse_loras(texts) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("high-noise=a", "'high-noise=a' is not DENOISER=FILE"), ("high_noise=", "'high_noise=' is not DENOISER=FILE"),
        ("a", "'a' is not DENOISER=FILE"),
        ("high_noise=x", "no LoRA file x"), ("high_noise=a,x:0.5", "no LoRA file x:0.5"),
        ("high_noise=a:", "no LoRA file a:"), ("high_noise=a:strong", "no LoRA file a:strong"),
        ("high_noise=two:0.5", r"can be read as two:0.5 \(strength 1\) or two \(strength 0.5\)"),
        ("high_noise=p,q:0.5", r"can be read as p \(strength 1\) and q \(strength 0.5\) or p,q \(strength 0.5\)"),
    ],
)  # fmt: skip
def test_what_is_not_there_or_can_be_read_in_two_ways_is_refused(files: None, text: str, words: str) -> None:
    with pytest.raises(typer.BadParameter, match=words):
        parse_loras([text])


def test_without_the_option_there_is_no_lora() -> None:
    assert parse_loras(None) == {}
