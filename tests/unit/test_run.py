"""Running a step: found, made, resumed, kept; and what its key is made of."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steps import code
from steps.errors import PrefloopError, StepFailed
from steps.run import KEY_LENGTH, Input, StepSpec, Store, execute, run_step

A, B = "a" * 64, "b" * 64


def spec_of(**changes: Any) -> StepSpec:
    inputs = {"evaluate": Input(Path("/nowhere"), A)}
    return replace(StepSpec("gate", "steps.gate:judge_evaluation", {"gate": {}}, inputs, 0), **changes)


class Work:
    """A launcher that writes a result and counts how often it is asked to."""

    def __init__(self, facts: Any = None, error: Exception | None = None) -> None:
        self.facts, self.error = facts if facts is not None else {"accuracy": 0.5}, error
        self.seen: list[list[str]] = []

    def __call__(self, partial: Path) -> None:
        self.seen.append(sorted(path.name for path in partial.iterdir()))
        (partial / "weights.bin").write_bytes(b"w")
        if self.error:
            raise self.error
        (partial / "facts.json").write_text(json.dumps(self.facts))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# -- the key -----------------------------------------------------------------------------------------------------


def test_the_key_is_short_hexadecimal_and_stands_in_the_name() -> None:
    spec = spec_of()
    assert len(spec.key) == KEY_LENGTH
    assert set(spec.key) <= set("0123456789abcdef")
    assert spec.name == f"gate-{spec.key}"


def test_the_key_ignores_paths() -> None:
    assert spec_of(inputs={"evaluate": Input(Path("/elsewhere"), A)}).key == spec_of().key


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "other"},
        {"function": "steps.base:prepare_base"},
        {"config": {"gate": {"win_rate_floor": 0.6}}},
        {"config": {}},
        {"inputs": {"evaluate": Input(Path("/nowhere"), B)}},
        {"inputs": {"champion": Input(Path("/nowhere"), A)}},
        {"inputs": {"evaluate": Input(Path("/nowhere"), A), "champion": Input(Path("/nowhere"), A)}},
        {"seed": 1},
    ],
)
def test_the_key_changes_with_everything_that_decides_the_result(changes: dict[str, Any]) -> None:
    assert spec_of(**changes).key != spec_of().key


def test_the_key_changes_with_the_code_and_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {spec_of().key}
    with monkeypatch.context() as patch:
        patch.setattr(code, "code_digest", lambda module: f"another {module}")
        keys.add(spec_of().key)
    with monkeypatch.context() as patch:
        patch.setattr(code, "library_versions", lambda: {"torch": "99"})
        keys.add(spec_of().key)
    assert len(keys) == 3


def test_a_judges_budget_is_passed_on_and_in_no_key() -> None:
    """What only decides whether a step ends is no other step; the judge's model is."""

    def judged(**llm: Any) -> StepSpec:
        return spec_of(config={"evaluate": {"judge": "llm", "llm": {"model": "m", **llm}}})

    assert judged(budget=5.0, attempts=9).key == judged(budget=1.0).key == judged().key
    assert judged(model="other").key != judged().key
    assert judged(budget=5.0).to_json()["config"]["evaluate"]["llm"]["budget"] == 5.0


def test_the_order_of_configuration_and_inputs_does_not_matter() -> None:
    one, two = Input(Path("/1"), A), Input(Path("/2"), B)
    forwards = spec_of(config={"a": 1, "b": 2}, inputs={"x": one, "y": two})
    backwards = spec_of(config={"b": 2, "a": 1}, inputs={"y": two, "x": one})
    assert forwards.key == backwards.key


def test_two_inputs_that_change_places_are_another_step() -> None:
    one, two = Input(Path("/1"), A), Input(Path("/2"), B)
    assert spec_of(inputs={"x": one, "y": two}).key != spec_of(inputs={"x": two, "y": one}).key


def test_a_spec_survives_json() -> None:
    spec = spec_of(config={"gate": {"win_rate_floor": 0.5}, "dtype": "auto"}, seed=7)
    again = StepSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert again.key == spec.key


# -- making and finding ------------------------------------------------------------------------------------------


def test_a_step_is_made_once_and_found_afterwards(store: Store) -> None:
    work = Work()
    made = run_step(spec_of(), store, work)
    found = run_step(spec_of(), store, work)
    assert len(work.seen) == 1
    assert (made.reused, made.resumed, found.reused) == (False, False, True)
    assert found.artifact == made.artifact
    assert found.seconds == 0


def test_a_made_artifact_holds_facts_files_key_and_inputs(store: Store) -> None:
    artifact = run_step(spec_of(), store, Work()).artifact
    assert artifact.path == store.path / spec_of().name
    assert (artifact.kind, artifact.key) == ("gate", spec_of().key)
    assert artifact.facts == {"accuracy": 0.5}
    assert artifact.inputs == {"evaluate": A}
    assert set(artifact.files) == {"weights.bin"}


def test_nothing_is_left_beside_a_made_artifact(store: Store) -> None:
    def work(partial: Path) -> None:
        (partial / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        Work()(partial)

    run_step(spec_of(), store, work)
    assert [path.name for path in store.path.iterdir() if path != store.locks] == [spec_of().name]
    names = {path.name for path in (store.path / spec_of().name).iterdir()}
    assert names == {"manifest.json", "spec.json", "weights.bin"}


def test_the_same_work_gives_the_same_digest_in_another_store(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    assert run_step(spec_of(), store, Work()).artifact.digest == run_step(spec_of(), other, Work()).artifact.digest


def test_the_starter_is_told_before_the_work_and_not_at_all_when_it_is_found(store: Store) -> None:
    told: list[tuple[Path, bool]] = []
    work = Work()
    for _ in range(2):
        run_step(spec_of(), store, work, lambda partial, resumed: told.append((partial, resumed)))
    assert told == [(store.partial(spec_of()), False)]


# -- failing and resuming ----------------------------------------------------------------------------------------


def test_a_failed_launch_keeps_its_partial_directory(store: Store) -> None:
    with pytest.raises(StepFailed, match="out of luck"):
        run_step(spec_of(), store, Work(error=StepFailed("out of luck")))
    assert (store.partial(spec_of()) / "weights.bin").is_file()
    assert store.find(spec_of()) is None


def test_a_second_try_is_told_that_it_resumes_and_finds_what_was_done(store: Store) -> None:
    with pytest.raises(StepFailed):
        run_step(spec_of(), store, Work(error=StepFailed("out of luck")))
    told: list[bool] = []
    work = Work()
    outcome = run_step(spec_of(), store, work, lambda partial, resumed: told.append(resumed))
    assert told == [True]
    assert outcome.resumed
    assert not outcome.reused
    assert "weights.bin" in work.seen[0]
    assert not store.partial(spec_of()).exists()


def test_the_seconds_of_a_resumed_step_are_those_of_both_tries(store: Store) -> None:
    partial = store.partial(spec_of())
    partial.mkdir()
    (partial / "seconds.json").write_text("1000.5")
    outcome = run_step(spec_of(), store, Work())
    assert 1000.5 <= outcome.artifact.seconds < 1060
    assert outcome.seconds < 60


def test_a_failed_try_leaves_its_seconds(store: Store) -> None:
    for _ in range(2):
        with pytest.raises(StepFailed):
            run_step(spec_of(), store, Work(error=StepFailed("out of luck")))
    assert 0 < json.loads((store.partial(spec_of()) / "seconds.json").read_text()) < 60


@pytest.mark.parametrize("text", [None, "{"])
def test_facts_are_required(store: Store, text: str | None) -> None:
    def work(partial: Path) -> None:
        if text is not None:
            (partial / "facts.json").write_text(text)

    with pytest.raises(PrefloopError) as caught:
        run_step(spec_of(), store, work)
    assert "the gate step ended without its facts" in str(caught.value)
    assert str(store.partial(spec_of())) in str(caught.value)
    assert store.partial(spec_of()).is_dir()
    assert store.find(spec_of()) is None


def test_a_broken_artifact_is_not_reused(store: Store) -> None:
    artifact = run_step(spec_of(), store, Work()).artifact
    (artifact.path / "weights.bin").unlink()
    with pytest.raises(PrefloopError, match=r"weights\.bin"):
        run_step(spec_of(), store, Work())
    shutil.rmtree(artifact.path)
    assert not run_step(spec_of(), store, Work()).reused


def test_a_kill_between_sealing_and_renaming_costs_nothing_but_the_work(store: Store) -> None:
    artifact = run_step(spec_of(), store, Work()).artifact
    artifact.path.rename(store.partial(spec_of()))
    again = run_step(spec_of(), store, Work()).artifact
    assert again.digest == artifact.digest
    assert set(again.files) == {"weights.bin"}


def test_two_threads_that_want_the_same_step_run_it_once(store: Store) -> None:
    work, begun, go_on = Work(), threading.Event(), threading.Event()

    def slow(partial: Path) -> None:
        begun.set()
        assert go_on.wait(10)
        work(partial)

    outcomes: list[Any] = []
    callers = [threading.Thread(target=lambda: outcomes.append(run_step(spec_of(), store, slow))) for _ in range(2)]
    for caller in callers:
        caller.start()
    assert begun.wait(10)
    go_on.set()
    for caller in callers:
        caller.join(20)
    assert len(work.seen) == 1
    assert sorted(outcome.reused for outcome in outcomes) == [False, True]
    assert outcomes[0].artifact == outcomes[1].artifact


def test_forgetting_drops_the_artifact_and_work_towards_it(store: Store) -> None:
    run_step(spec_of(), store, Work())
    store.partial(spec_of()).mkdir()
    other = run_step(spec_of(seed=1), store, Work()).artifact
    store.forget(spec_of())
    assert store.find(spec_of()) is None
    assert not store.partial(spec_of()).exists()
    assert store.find(spec_of(seed=1)) == other
    store.forget(spec_of())


# -- in this process ---------------------------------------------------------------------------------------------


def test_a_real_step_is_run_with_its_section_its_inputs_and_its_facts(store: Store, tmp_path: Path) -> None:
    measured = {"judge": "gold", "judge_accuracy": 0.9, "win_rate": 0.7, "win_rate_low": 0.6}
    inputs = {}
    for name, facts in (("evaluate", measured), ("reward", {}), ("policy", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"facts": facts}))
        inputs[name] = Input(tmp_path / name, A)
    for floor, promote in ((0.55, True), (0.65, False)):
        spec = spec_of(config={"gate": {"win_rate_floor": floor, "guards": {}}}, inputs=inputs)
        artifact = run_step(spec, store, execute).artifact
        assert artifact.facts["promote"] is promote
        assert json.loads((artifact.path / "verdict.json").read_text()) == artifact.facts
