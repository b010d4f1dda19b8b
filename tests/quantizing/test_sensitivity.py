"""A run with a budget: measured once, resumed to the same bytes, and repeated by the recipe that it
stores.
"""

import shutil
from pathlib import Path

import pytest

import tempoquant
from tempoquant import Recipe
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.checkpoint.reader import read_config
from tempoquant.errors import CalibrationError, OutputError, RecipeError
from tempoquant.hosts.contents import contents_of
from tempoquant.models.fingerprint import fingerprint
from tempoquant.quantizing import Budget, Machine, measure_sensitivity, pipeline
from tempoquant.quantizing import plan as planned
from tempoquant.quantizing import sensitivity as measuring
from tempoquant.quantizing.run import Run
from tempoquant.recording.plan import ModelIdentity
from tempoquant.recording.record import record
from tests.recorded import CPU, SOURCE, bytes_of, plan

QUICK = Recipe.load("default").replace(
    num_prompts=1, num_steps=4, samples_per_denoiser=2, rank=2, height=32, width=32, num_frames=5
)
BUDGET = Budget(bits_per_weight=5.0)
COMPONENTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def within_budget(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tempoquant.quantize("tiny", tmp_path_factory.mktemp("budget") / "out", QUICK, budget=BUDGET)


def test_the_layers_get_ranks_of_their_own_within_the_budget(within_budget: Path) -> None:
    contents = contents_of(within_budget)
    assert contents.bits_per_weight <= 5.0
    assert all(len(denoiser.ranks) > 1 for denoiser in contents.denoisers)
    assert contents.recipe["name"] == "default (5 bits a weight)"


def test_the_recipe_that_is_stored_gives_the_same_bytes_without_a_budget(within_budget: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "resolved.toml"
    recipe.write_text(read_config(within_budget / "transformer").recipe.to_toml())
    again = tempoquant.quantize("tiny", tmp_path / "again", recipe)
    for component in COMPONENTS:
        assert bytes_of(again / component) == bytes_of(within_budget / component)


def test_a_run_that_goes_on_does_not_measure_again_and_ends_with_the_same_bytes(
    within_budget: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "Quantizing", interrupted)
        tempoquant.quantize("tiny", tmp_path / "out", QUICK, budget=BUDGET)
    assert sorted(p.name for p in (tmp_path / "out.unfinished").glob("*sensitivity*")) == ["sensitivity.json"]
    with pytest.raises(OutputError, match="different budget"):
        tempoquant.quantize("tiny", tmp_path / "out", QUICK, budget=Budget(bits_per_weight=5.5))
    monkeypatch.setattr(measuring, "sensitivity_of", interrupted)
    assert bytes_of(tempoquant.quantize("tiny", tmp_path / "out", QUICK, budget=BUDGET)) == bytes_of(within_budget)


def test_a_finished_run_is_known_by_its_budget(within_budget: Path) -> None:
    assert tempoquant.quantize("tiny", within_budget, QUICK, budget=BUDGET) == within_budget
    with pytest.raises(OutputError, match="different budget"):
        tempoquant.quantize("tiny", within_budget, QUICK)


def test_a_file_measured_before_is_what_a_run_would_measure_and_serves_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(SOURCE, tmp_path / "store", plan(1, 4), model=ModelIdentity(fingerprint(SOURCE)), engine=CPU)
    recipe = Recipe.load("default").replace(rank=2)
    found = measure_sensitivity("tiny", tmp_path / "store", tmp_path / "work", recipe, machine=Machine(("cpu",)))
    assert list((tmp_path / "work").iterdir()) == []
    file = tmp_path / "given.json"
    file.write_text(found.to_json())

    recipes = []

    def begin(run: Run, *_: object) -> None:
        recipes.append(run.recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "jobs", begin)
    for name, given in (("measured", {}), ("given", {"sensitivity": file})):
        with pytest.raises(KeyboardInterrupt):
            tempoquant.quantize("tiny", tmp_path / name, recipe, store=tmp_path / "store", budget=BUDGET, **given)
    assert recipes[0] == recipes[1] and recipes[0].layers
    assert (tmp_path / "measured.unfinished" / "sensitivity.json").read_text() == file.read_text()
    assert not (tmp_path / "given.unfinished" / "sensitivity.json").exists()

    what = {"store": tmp_path / "store", "sensitivity": file}
    with pytest.raises(CalibrationError, match="other format"):
        tempoquant.quantize("tiny", tmp_path / "c", recipe.replace(format="int4"), budget=BUDGET, **what)
    with pytest.raises(RecipeError, match="there to spend a budget by"):
        tempoquant.quantize("tiny", tmp_path / "c", recipe, **what)


def test_measuring_by_itself_asks_for_room_and_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(SOURCE, tmp_path / "store", plan(1, 4), model=ModelIdentity(fingerprint(SOURCE)), engine=CPU)
    recipe = Recipe.load("default").replace(rank=2)
    asked: list[int] = []
    of_cost = measuring.states_bytes
    monkeypatch.setattr(measuring, "states_bytes", lambda cost: asked.append(of_cost(cost)) or asked[-1])
    taken: list[int] = []
    commit = HiddenStates.commit

    def watched(states: HiddenStates, block: int) -> None:
        commit(states, block)
        taken.append(sum(file.stat().st_size for file in (tmp_path / "work").rglob("*") if file.is_file()))

    monkeypatch.setattr(HiddenStates, "commit", watched)
    measure_sensitivity("tiny", tmp_path / "store", tmp_path / "work", recipe, machine=Machine(("cpu",)))
    needed = max(asked)
    assert needed <= max(taken) < needed + 2**12  # what is foreseen, and the headers of the files

    room = shutil._ntuple_diskusage(needed, 1, needed - 1)
    monkeypatch.setattr(measuring.shutil, "disk_usage", lambda _: room)
    monkeypatch.setattr(measuring, "measure_denoiser", lambda *_: pytest.fail("it began"))
    with pytest.raises(OutputError, match=r"hidden states need 0\.0 GiB .* or record fewer samples"):
        measure_sensitivity("tiny", tmp_path / "store", tmp_path / "new", recipe, machine=Machine(("cpu",)))
    room = shutil._ntuple_diskusage(needed, 1, needed)  # enough for one denoiser, not for two side by side
    with pytest.raises(OutputError, match="hidden states need"):
        measure_sensitivity("tiny", tmp_path / "store", tmp_path / "new", recipe, machine=Machine(("cpu", "cpu")))
    assert not (tmp_path / "new").exists()


def test_a_plan_says_that_sensitivity_is_measured_and_what_that_takes(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in planned("tiny", QUICK, device="cpu", budget=BUDGET).stages}
    assert list(stages) == [
        "record", "measure sensitivity of high_noise", "measure sensitivity of low_noise", "quantize high_noise",
        "quantize low_noise", "write",
    ]  # fmt: skip
    measuring = stages["measure sensitivity of high_noise"]
    assert measuring.seconds and measuring.disk_gib > stages["record"].disk_gib
    with pytest.raises(RecipeError, match="too small"):
        planned("tiny", QUICK, device="cpu", budget=Budget(bits_per_weight=2.0))
