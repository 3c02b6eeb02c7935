"""Whether to train again, what is said of drift, and who waits for whom."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from steps import locks
from steps.config import Recipe, assigned, parse
from steps.drift import Finding
from steps.errors import RecipeError
from steps.registry import ROLLED_BACK, Version
from steps.retraining import Drift, decide, drift_since, recipe_digest
from steps.run import Input
from steps.versions import DataVersion

REPOSITORY = Path(__file__).parents[2]
RECIPE = parse({"name": "m", "model": {"base": "base"}}, "here")


def data(md5: str = "a") -> DataVersion:
    return DataVersion("mine", {"preferences": Input(Path("p"), md5)}, "", {})


def version(number: int, seen: DataVersion, **tags: str) -> Version:
    given = {"data": seen.name, "data_digest": seen.digest, "recipe_digest": "r", **tags}
    return Version("m", str(number), f"run-{number}", given)


# -- the decision ------------------------------------------------------------------------------------------------


def test_without_a_model_the_first_one_is_trained() -> None:
    found = decide(None, [], data(), "r")
    assert (found.why, found.train, found.champion) == ("first", True, None)


def test_the_champions_own_data_are_nothing_new() -> None:
    champion = version(3, data())
    found = decide(champion, [champion], data(), "another recipe")
    assert (found.why, found.train) == ("nothing new", False)
    assert found.because.startswith("nothing new since models:/m/3 (data mine ")


def test_other_data_than_the_champions_are_new() -> None:
    champion = version(1, data("a"))
    found = decide(champion, [champion], data("b"), "r")
    assert (found.why, found.train) == ("new data", True)
    assert data("a").digest[:12] in found.because and data("b").digest[:12] in found.because


def test_data_of_the_same_bytes_under_another_name_are_new() -> None:
    champion = version(1, data(), data="theirs")
    assert decide(champion, [champion], data(), "r").why == "new data"


def test_data_a_challenger_was_made_from_are_not_tried_again_and_the_gates_reasons_are_told() -> None:
    champion = version(1, data("a"))
    verdict = "yes: the judge is good | NO: win rate 0.41, lower bound 0.33 | NO: length_ratio 2.9"
    tried = [champion, version(2, data("b"), verdict=verdict)]
    found = decide(champion, tried, data("b"), "r")
    assert (found.why, found.train) == ("kept back", False)
    assert "models:/m/2" in found.because
    assert found.because.endswith("kept back because win rate 0.41, lower bound 0.33; length_ratio 2.9")


def test_a_version_people_took_down_is_not_made_again() -> None:
    champion = version(1, data("a"))
    tried = [champion, version(2, data("b"), **{ROLLED_BACK: "readers disliked it"})]
    assert "taken down by people: readers disliked it" in decide(champion, tried, data("b"), "r").because


def test_data_that_went_back_to_an_older_version_were_tried() -> None:
    older, champion = version(1, data("a")), version(2, data("b"))
    found = decide(champion, [older, champion], data("a"), "r")
    assert (found.why, found.train) == ("kept back", False)
    assert "since replaced by another champion" in found.because


def test_without_a_champion_what_was_kept_back_is_not_tried_again() -> None:
    found = decide(None, [version(1, data(), verdict="NO: alarm length")], data(), "r")
    assert (found.why, found.train) == ("kept back", False)


def test_force_trains_on_what_was_tried_and_says_so() -> None:
    champion = version(1, data())
    found = decide(champion, [champion], data(), "r", force=True)
    assert (found.why, found.train) == ("forced", True)
    assert "models:/m/1" in found.because


@pytest.mark.parametrize(("recipe", "why"), [("r", "nothing new"), ("s", "new recipe")])
def test_a_new_recipe_counts_when_asked_for(recipe: str, why: str) -> None:
    champion = version(1, data())
    assert decide(champion, [champion], data(), recipe, new_recipe_counts=True).why == why
    assert decide(champion, [champion], data(), recipe).why == "nothing new"


def test_the_digest_of_a_recipe_is_that_of_what_can_change_a_model() -> None:
    def digest(**changes: Any) -> str:
        return recipe_digest(assigned(RECIPE, {name.replace("__", "."): value for name, value in changes.items()}))

    same = digest()
    assert digest(launch__threads=1, launch__timeout=5) == same
    assert digest(name="other") == same
    assert digest(policy__ppo__gamma=0.5) == same  # the method is dpo
    assert len({same, digest(seed=1), digest(policy__start="champion"), digest(gate__win_rate_floor=0.6)}) == 4


# -- drift -------------------------------------------------------------------------------------------------------


def rows(words: str, count: int = 60) -> pd.DataFrame:
    return pd.DataFrame({"row_id": [f"{words} {row}" for row in range(count)], "chosen": words, "rejected": "bad"})


@pytest.fixture
def drifting(tmp_path: Path) -> tuple[Path, str]:
    """A project that got some longer rows since the version whose md5 is returned; DVC's cache holds both."""
    here = tmp_path / "data" / "mine"
    here.mkdir(parents=True)
    old = here / "valid.parquet"
    rows("short", 600).to_parquet(old)
    md5 = hashlib.md5(old.read_bytes()).hexdigest()
    kept = tmp_path / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    kept.parent.mkdir(parents=True)
    old.rename(kept)
    pd.concat([rows("short", 600), rows("a much longer answer")]).to_parquet(here / "valid.parquet")
    return tmp_path, md5


def test_new_rows_are_held_against_those_of_the_champion(drifting: tuple[Path, str]) -> None:
    root, md5 = drifting
    found = drift_since(version(1, data(), data_valid=md5), data("b"), root)
    assert "answer length" in found.in_words()
    assert "drift since models:/m/1" in found.in_words()
    lengths = next(line for line in found.markdown().splitlines() if "answer length" in line and line.startswith("|"))
    assert lengths.startswith("| **answer length** | median 5 characters | median 20 characters | KS D | 1.000 |")


def test_a_cached_table_that_was_changed_is_not_used(drifting: tuple[Path, str]) -> None:
    root, md5 = drifting
    (root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).write_bytes(b"something else")
    found = drift_since(version(1, data(), data_valid=md5, data_revision="no git"), data("b"), root)
    assert found.findings == []
    assert "were never committed, and DVC's cache does not hold them" in found.in_words()


def test_data_that_cannot_be_had_are_told_and_stop_nothing(tmp_path: Path) -> None:
    found = drift_since(version(1, data(), data_revision="0123456789abcdef+"), data("b"), tmp_path)
    assert found.problem
    assert found.in_words().startswith("not compared with the data of models:/m/1: ")
    assert found.in_words() in found.markdown()


def test_another_dataset_is_not_compared(tmp_path: Path) -> None:
    assert "another dataset, theirs" in drift_since(version(1, data(), data="theirs"), data(), tmp_path).problem


def test_a_table_of_findings_survives_bars_in_their_words() -> None:
    finding = Finding("sources", "a|b 50%", "c 1%", "Cramér's V", 0.01, 0.1, 0.5)
    assert r"a\|b 50%" in Drift("models:/m/1", [finding]).markdown()
    assert Drift("models:/m/1", [finding]).in_words() == "no drift since models:/m/1"


# -- turns -------------------------------------------------------------------------------------------------------


def test_the_second_waits_for_the_first_and_is_told_who_that_is(tmp_path: Path) -> None:
    told: list[str] = []
    order: list[str] = []
    waiting = threading.Event()

    def tell(whom: str) -> None:
        told.append(whom)
        waiting.set()

    def second() -> None:
        with locks.held(tmp_path, ["cpu"], "the second", tell):
            order.append("second")

    thread = threading.Thread(target=second)
    with locks.held(tmp_path, ["cpu"], "`policy` of recipes/a.yaml", told.append):
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert len(told) == 1
    assert told[0].startswith("for cpu, which `policy` of recipes/a.yaml (process ")
    assert "since 20" in told[0]


def test_a_lock_of_a_dead_process_is_free_and_its_note_fools_nobody(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from steps import locks\n"
        "with locks.held(Path(sys.argv[1]), ['cpu'], 'the dead', print): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=REPOSITORY)
    assert "the dead" in (tmp_path / "cpu.json").read_text()
    told: list[str] = []
    with locks.held(tmp_path, ["cpu"], "the living", told.append):
        assert "the living" in (tmp_path / "cpu.json").read_text()
    assert told == []
    assert not (tmp_path / "cpu.json").exists()


def test_several_locks_are_taken_in_one_order_by_all(tmp_path: Path) -> None:
    """Two that want the same two devices, named in different orders, both get them: no deadlock."""
    done: list[int] = []

    def work(names: list[str]) -> None:
        for _ in range(20):
            with locks.held(tmp_path, names, "", lambda whom: None):
                done.append(1)

    threads = [threading.Thread(target=work, args=(names,)) for names in (["a", "b"], ["b", "a"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 40


@pytest.mark.parametrize(
    ("there", "visible", "version", "names"),
    [
        ([], None, "2.13.0", ["cpu"]),
        (["nvidia0", "nvidia1"], None, "2.13.0", ["cuda-0", "cuda-1"]),
        (["nvidia0", "nvidia1"], "1", "2.13.0", ["cuda-1"]),
        (["nvidia0"], "", "2.13.0", ["cpu"]),
        (["nvidia0"], None, "2.13.0+cpu", ["cpu"]),
    ],
)
def test_devices_are_those_a_training_would_see(
    there: list[str], visible: str | None, version: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "metadata", type("metadata", (), {"version": staticmethod(lambda name: version)}))
    monkeypatch.setattr(locks.Path, "glob", lambda self, pattern: [Path("/dev") / name for name in there])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert locks.devices() == names


# -- the recipe's part -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy.method": "best_of_n", "policy.start": "champion"}, "best_of_n trains nothing"),
        ({"launch.launcher": "here", "launch.timeout": 5}, "cannot be ended"),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        assigned(RECIPE, changes)


def test_the_deployment_for_work_pools_names_what_is_there() -> None:
    """`prefect.yaml` is read by Prefect only when somebody deploys."""
    from flows.announce import LANDED, resource_of
    from flows.serve import read_recipe

    (deployment,) = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    (step,) = deployment["build"]
    (name, inputs), *_ = step.items()
    assert name == f"{read_recipe.__module__}.{read_recipe.__name__}"
    recipe = Recipe.model_validate(read_recipe(str(REPOSITORY / inputs["path"]))["recipe"])
    (trigger,) = deployment["triggers"]
    assert trigger["after"] == trigger["expect"] == [LANDED]
    assert trigger["match"]["prefect.resource.id"] == resource_of(recipe.data.name)
    assert trigger["for_each"]  # else it would fire for ever, without any data
    module, function = deployment["entrypoint"].split(":")
    assert f"def {function}(" in (REPOSITORY / module).read_text()
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
