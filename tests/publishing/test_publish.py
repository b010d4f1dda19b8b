"""`tempoquant publish` against a hub on this machine."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tempoquant.checkpoint.manifest import read_manifest, write_manifest
from tempoquant.hosts.comfyui.export import export
from tempoquant.models.source import SourceModel
from tempoquant.quantizing import quantize
from tests.cli.typed import assert_refused, run
from tests.hub_server import TOKEN, HubServer, point_here, serve
from tests.quantized_wan import tiny_pipeline

NAME = "someone/wan-4bit"
LICENSED = "---\nlicense: other\nlicense_name: some-licence\nlicense_link: https://example.org/l\n---\n# A model\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_pipeline().save_pretrained(folder)
    (folder / "README.md").write_text(LICENSED)
    return folder


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    return quantize(source, source.with_name("quantized"), "rtn")


@pytest.fixture(scope="module")
def evaluation(source: Path, quantized: Path) -> Path:
    """Return a whole evaluation of two items."""
    folder = source.with_name("evaluation")
    Image.new("RGB", (16, 16), "red").save(source.with_name("first.png"))
    lines = [json.dumps({"id": name, "prompt": f"a cat {name}", "image": "first.png"}) for name in ("walks", "runs")]
    (source.parent / "prompts.jsonl").write_text("\n".join(lines))
    result = run(
        "evaluate", source, quantized, "--benchmark", source.parent / "prompts.jsonl", "-o", folder, "--size", "32x32",
        "--frames", 5, "--steps", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with serve() as found:
        point_here(monkeypatch, found, tmp_path / "cache")
        monkeypatch.setattr("time.sleep", lambda _: None)
        yield found


def metadata(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---")[1])


def test_a_damaged_card_of_the_16_bit_model_costs_no_work(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    (folder / "README.md").write_text("---\ntags: [a\n---\n# A model\n")
    with pytest.warns(UserWarning, match="cannot be read: the new card names no licence"):
        made = quantize(folder, tmp_path / "out", "rtn")
    assert "license" not in metadata((made / "README.md").read_text())


@pytest.mark.parametrize("front", ["tags: [a", "- a\n- list", "model-index:\n- name: a"])
def test_a_damaged_front_matter_is_named_before_files_are_read(
    hub: HubServer, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, front: str
) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "edited"))
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    monkeypatch.setattr("tempoquant.publishing.publication.verify_folder", lambda *_, **__: pytest.fail("it began"))
    assert_refused(run("publish", folder, "--to", NAME), 1, "cannot be read")
    assert not hub.repositories


def test_what_is_published_is_what_is_fetched_and_verifies(hub: HubServer, quantized: Path) -> None:
    result = run("publish", quantized, "--to", NAME, "--base-model", "Wan-AI/Wan2.2", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    repository = hub.repositories[NAME]
    assert repository.private and record["visibility"] == "private" and len(repository.commits) == 2
    assert record["url"] == f"{hub.endpoint}/{NAME}" and {each["name"] for each in record["files"]} < set(
        repository.files
    )
    verified = run("inspect", NAME, "--verify", "--json")
    assert verified.exit_code == 0, verified.output
    assert "README.md" in json.loads(verified.stdout)["verified_files"]
    shard = next(name for name in repository.files if name.startswith("transformer_2/") and name.endswith("tensors"))
    assert (SourceModel.open(NAME).folder / shard).read_bytes() == (quantized / shard).read_bytes()
    assert TOKEN not in result.output + verified.output


def test_the_card_states_origin_licence_use_and_that_nothing_was_measured(hub: HubServer, quantized: Path) -> None:
    shown = run("publish", quantized, "--to", NAME, "--base-model", "Wan-AI/Wan2.2", "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output
    assert hub.requests == []
    card = json.loads(shown.stdout)["card"]
    data = metadata(card)
    assert (data["license"], data["license_name"], data["license_link"]) == (
        "other", "some-licence", "https://example.org/l",
    )  # fmt: skip
    assert (data["base_model"], data["base_model_relation"]) == ("Wan-AI/Wan2.2", "quantized")
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "image-to-video")
    assert {"tempoquant", "quantized", "W4A4", "mxfp4"} <= set(data["tags"])
    assert f'from_pretrained("{NAME}")' in card and "this folder" not in card
    assert f"tempoquant export {NAME} --to comfyui" in card and f"tempoquant generate {NAME} --image" in card
    assert "| high_noise | 10 |" in card and "| low_noise | 10 |" in card
    assert "Nothing." in card and "no evaluation of this model was attached" in card
    assert "[some-licence](https://example.org/l)" in card


def test_figures_page_and_contact_sheet_of_an_evaluation_go_along(
    hub: HubServer, quantized: Path, evaluation: Path
) -> None:
    result = run("publish", quantized, "--to", NAME, "--report", evaluation, "--public", "--license", "mit")
    assert result.exit_code == 0, result.output
    files, found = hub.repositories[NAME].files, json.loads((evaluation / "evaluation.json").read_text())
    assert not hub.repositories[NAME].private
    card = files["README.md"].decode()
    [psnr] = [row for row in found["summary"] if (row["label"], row["metric"]) == ("quantized", "psnr_db")]
    assert f"| PSNR | {psnr['words']} |" in card and "VBench's dimensions." in card and "on a GPU" in card
    assert files["contact_sheet.png"].startswith(b"\x89PNG") and b"<html" in files["report.html"]
    data = metadata(card)
    assert data["license"] == "mit" and "license_link" not in data and "base_model" not in data
    assert str(quantized.parent) not in card, "a card tells nothing of the machine that wrote it"


def test_an_evaluation_of_another_model_is_refused(hub: HubServer, source: Path, evaluation: Path) -> None:
    other = quantize(source, source.with_name("other"), "rtn", seed=1)
    (other / "transformer" / "config.json").write_text(
        (other / "transformer" / "config.json").read_text().replace('"notes": []', '"notes": ["x"]')
    )
    write_manifest(other, read_manifest(other).run)
    result = run("publish", other, "--to", NAME, "--report", evaluation, "--license", "mit", "--dry-run")
    assert_refused(result, 1, "measured quantized, and none of these is")


def test_an_upload_that_broke_off_sends_only_what_is_missing(hub: HubServer, quantized: Path) -> None:
    hub.uploads_left = 2
    first = run("publish", quantized, "--to", NAME)
    assert_refused(first, 1, "What arrived is not sent again: repeat the command")
    assert len(hub.repositories[NAME].commits) == 1, "a part of the model is visible"
    sent, hub.uploads_left, hub.requests = set(hub.blobs), None, []
    assert len(sent) == 2
    assert run("publish", quantized, "--to", NAME).exit_code == 0
    again = {each.rpartition("/")[2] for each in hub.requests if each.startswith("PUT ")}
    assert again and not again & sent and again | sent == set(hub.blobs)
    hub.requests = []
    assert run("publish", quantized, "--to", NAME).exit_code == 0
    assert not any(each.startswith("PUT ") for each in hub.requests) and len(hub.repositories[NAME].commits) == 2


def test_a_name_that_holds_something_else_is_left_alone(hub: HubServer, quantized: Path) -> None:
    hub.add(NAME, {"notes.txt": b"mine"}, private=True)
    before = len(hub.repositories[NAME].commits)
    result = run("publish", quantized, "--to", NAME)
    assert_refused(result, 1, "exists and holds notes.txt, which is not published (1 such files)")
    assert len(hub.repositories[NAME].commits) == before
    assert run("publish", quantized, "--to", NAME, "--overwrite").exit_code == 0
    assert "notes.txt" not in hub.repositories[NAME].files and "model_index.json" in hub.repositories[NAME].files
    hub.repositories[NAME].files["model_index.json"] += b" "
    assert_refused(run("publish", quantized, "--to", NAME), 1, "holds another model_index.json (1 such files)")


@pytest.mark.parametrize(("private", "flags"), [(False, ()), (True, ("--public",))])
def test_a_visibility_that_was_not_asked_for_is_refused(
    hub: HubServer, quantized: Path, private: bool, flags: tuple[str, ...]
) -> None:
    hub.add(NAME, {}, private=private)
    for more in ((), ("--overwrite",)):
        words = "exists and is private" if private else "exists and is public: say --public"
        assert_refused(run("publish", quantized, "--to", NAME, *flags, *more), 1, words)


def test_nobody_logged_in_is_said_first(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert_refused(run("publish", tmp_path, "--to", NAME), 1, "run `hf auth login`, or set HF_TOKEN")
    assert hub.requests == []


def test_a_token_that_is_refused_is_never_shown(
    hub: HubServer, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.forbidden = True
    assert_refused(run("publish", quantized, "--to", NAME), 1, "your token may not write to someone/wan-4bit")
    wrong = "hf_" + "wrong" * 7
    monkeypatch.setenv("HF_TOKEN", wrong)
    result = run("publish", quantized, "--to", NAME)
    assert_refused(result, 1, "the hub does not take the token")
    assert wrong not in result.output + result.stderr and wrong in hub.tokens


def test_what_is_no_whole_quantized_pipeline_is_refused(
    hub: HubServer, source: Path, quantized: Path, tmp_path: Path
) -> None:
    exported = export(quantized, tmp_path / "exported")
    assert_refused(run("publish", exported, "--to", NAME), 1, "is an export to comfyui: publish the folder that it was")
    assert_refused(run("publish", source, "--to", NAME), 1, "holds no tempoquant.json")
    assert_refused(run("publish", tmp_path / "nowhere", "--to", NAME), 1, "there is no folder")
    for name in ("wan", "a/b/c", "someone/wan@main", "some one/wan"):
        assert_refused(run("publish", quantized, "--to", name, "--dry-run"), 1, name)
    incomplete = shutil.copytree(quantized, tmp_path / "incomplete")
    (incomplete / "vae" / "config.json").unlink()
    assert_refused(run("publish", incomplete, "--to", NAME), 1, "config.json is missing")
    altered = shutil.copytree(quantized, tmp_path / "altered")
    (altered / "vae" / "config.json").write_text((altered / "vae" / "config.json").read_text() + " ")
    assert_refused(run("publish", altered, "--to", NAME), 1, "SHA-256 differs")
    assert hub.requests == []


def test_a_licence_is_never_made_up(hub: HubServer, quantized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized, tmp_path / "unlicensed")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("license: other\n", "").replace("# A 4-bit", "# My own words, a"))
    (folder / "secret.txt").write_text("not listed")
    assert_refused(run("publish", folder, "--to", NAME, "--dry-run"), 1, "say which one it is under with --license")
    shown = json.loads(run("publish", folder, "--to", NAME, "--license", "mit", "--dry-run", "--json").stdout)
    assert shown["left_out"] == ["secret.txt"] and "My own words" in shown["card"]
