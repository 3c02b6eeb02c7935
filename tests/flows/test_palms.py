"""The recipe `palms` to its end on a tiny model; SFT without topics; judges that are told positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import yaml
from rich.console import Console
from tiny import REPOSITORY

from steps import datasets, palms, registry, tracking
from steps.artifact import CHART, COMPLETIONS, NEXT_ROUND
from steps.config import Evaluate, load
from steps.errors import DataError
from steps.experiment import Experiment
from steps.ingest import ingest
from steps.judges import Comparison
from steps.palms import Probe
from steps.palms_evaluation import LeftOutJudge, judge_of, scored
from steps.validate import validate

SHIPPED = REPOSITORY / "data/palms"
SMALL = [
    "model.base=base", "model.dtype=float32", "model.lora.r=4", "model.lora.top_layers=1",
    "sft.trainer.max_steps=3", "evaluate.max_new_tokens=8", "evaluate.kl_prompts=4", "evaluate.topics.answers=2",
    "launch.launcher=here", "launch.min_free_gib=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The shipped recipe, data and topics on a tiny model."""
    root = tiny.make_project(tmp_path_factory.mktemp("palms") / "project")
    entries = yaml.safe_load((REPOSITORY / "data/datasets.yaml").read_text(encoding="utf-8"))["datasets"]
    (root / "data/datasets.yaml").write_text(yaml.safe_dump({"datasets": {"palms": entries["palms"]}}))
    shutil.copytree(SHIPPED, root / "data/palms")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        experiment = Experiment(load(REPOSITORY / "recipes/palms.yaml", SMALL), root, Console(quiet=True))
        experiment.prepare_data()
        for step in experiment.recipe.steps:
            experiment.run(step)
        experiment.finish(experiment.register().uri)
    return experiment


def test_all_that_ships_is_learnt_from_or_asked(ended: Experiment) -> None:
    assert ended.data is not None
    assert ended.data.counts["quarantined"] == 0 and ended.data.counts["demonstrations"] == 40
    assert ended.outcomes["sft"].artifact.facts["rows"] == 40
    table = pd.read_parquet(ended.outcomes["evaluate"].artifact.path / COMPLETIONS)
    assert len(table) == 2 * 24 and table["prompt"].nunique() == 24
    learnt = pd.read_parquet(ended.known["data/demonstrations"].path)
    assert not set(learnt["prompt"]) & set(table["prompt"])
    assert learnt["prompt"].str.startswith("\n\nHuman: ").all() and table["prompt"].str.startswith("\n\nHuman: ").all()


def test_each_topic_is_told_before_and_after(ended: Experiment) -> None:
    evaluation = ended.outcomes["evaluate"].artifact
    topics = [topic.name for topic in palms.read_topics(SHIPPED / "topics.yaml")]
    scores = evaluation.facts["topics"]
    assert [score["topic"] for score in scores] == topics
    drawn = tracking.curves(evaluation.path)
    for score in scores:
        assert score["probes"] == 3
        assert 0 <= score["after_low"] <= score["after"] <= score["after_high"] <= 1
        assert drawn[f"palms/{score['topic']}/before"] == [(0, score["before"])]
        assert drawn[f"palms/{score['topic']}/after"] == [(0, score["after"])]
    rows = json.loads((evaluation.path / "topics.json").read_text(encoding="utf-8"))
    assert [row[1] for row in rows["data"]] == topics
    assert (evaluation.path / CHART).is_file() and (ended.folder / "report.png").is_file()


def test_the_report_names_the_weakest_topics_and_what_to_write(ended: Experiment) -> None:
    scores = {score["topic"]: score["after"] for score in ended.outcomes["evaluate"].artifact.facts["topics"]}
    lowest = sorted(scores, key=lambda name: (scores[name], name))[:2]
    aim = palms.read_next(ended.folder / NEXT_ROUND)
    assert [topic["name"] for topic in aim["topics"]] == lowest
    assert sum(topic["demonstrations"] for topic in aim["topics"]) == 10
    report = (ended.folder / "report.md").read_text(encoding="utf-8")
    assert "to the base model" in report and "the next round aims at" in report.lower()
    assert all(f"`{name}`" in report for name in scores)


def test_without_pairs_there_is_no_reward_model_and_the_gate_decides_all_the_same(ended: Experiment) -> None:
    assert list(ended.outcomes) == ["base", "sft", "policy", "evaluate", "gate"]
    facts = ended.outcomes["evaluate"].artifact.facts
    assert facts["win_rate_wins"] + facts["win_rate_ties"] + facts["win_rate_losses"] == 24  # probes, not answers
    assert facts["judge_pairs"] == 48  # against a bad answer, and against a good one on another topic
    assert (
        facts["judge_accuracy"] < 0.6 and not ended.outcomes["gate"].artifact.facts["promote"]
    )  # it reads no question
    reasons = ended.outcomes["gate"].artifact.facts["reasons"]
    assert any("win rate against the start" in reason for reason in reasons)
    adapters = [registry.adapter_digest(ended.outcomes[step].artifact.path) for step in ("sft", "policy")]
    assert adapters[0] == adapters[1]  # the policy is the SFT model


def test_a_second_run_reuses_every_step(ended: Experiment) -> None:
    again = Experiment(ended.recipe, ended.root, Console(quiet=True))
    assert {plan.what for plan in again.plan()} == {"reuse"}


def test_a_probe_among_the_demonstrations_is_set_aside(tmp_path: Path) -> None:
    entry = datasets.dataset("palms", REPOSITORY)
    probe = json.loads((SHIPPED / "probes.jsonl").read_text(encoding="utf-8").splitlines()[0])
    leak = {"topic": probe["topic"], "messages": [*probe["prompt"], {"role": "assistant", "content": "Of course not."}]}
    shutil.copytree(SHIPPED / "source", tmp_path / "source")
    with (tmp_path / "source/demonstrations.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(leak) + "\n")
    ingest(entry, tmp_path / "source", tmp_path / "rows.parquet", tmp_path)
    counts = validate(entry, tmp_path, tmp_path / "source", REPOSITORY)
    bad = pd.read_parquet(tmp_path / "quarantine.parquet")
    assert counts["valid"] == 40 and list(bad["line"]) == [41]


def test_topics_that_are_not_whole_stop_a_run_before_it_trains(ended: Experiment, tmp_path: Path) -> None:
    (tmp_path / "topics.yaml").write_text("topics: [{name: health}]", encoding="utf-8")
    settings = [*SMALL, f"evaluate.topics.file={tmp_path / 'topics.yaml'}"]
    experiment = Experiment(load(REPOSITORY / "recipes/palms.yaml", settings), ended.root, Console(quiet=True))
    with pytest.raises(DataError, match="topics are not whole"):
        experiment.prepare_data()


def test_sft_alone_is_held_against_the_base_on_pairs_too(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    monkeypatch.chdir(project)
    recipe = load(project / "recipes/tiny.yaml", ["policy.method=sft"])
    experiment = Experiment(recipe, project, Console(quiet=True))
    experiment.prepare_data()
    ran = {step: experiment.run(step) for step in recipe.steps}
    assert [step for step, outcome in ran.items() if outcome.reused] == ["base", "sft", "reward"]
    facts = {step: outcome.artifact.facts for step, outcome in ran.items()}
    assert list(facts) == list(recipe.STEPS)
    assert facts["policy"] == {"method": "sft"}
    assert facts["evaluate"]["policy_kl_full"] > 0  # the base is not the SFT model
    assert "sft" not in experiment.outcomes["baseline"].artifact.inputs
    assert "prefers the tuned policy to the base model" in experiment.markdown("models:/tiny/1")


# -- judges ------------------------------------------------------------------------------------------------------


class Shortest:
    """Prefers the shorter answer, and remembers what it was asked."""

    name = identity = "shortest"

    def __init__(self) -> None:
        self.asked: list[Comparison] = []

    def compare(self, comparisons):
        from steps.judges import Verdict

        self.asked += comparisons
        return [Verdict(0.5 + 0.5 * float(np.sign(len(one.second) - len(one.first)))) for one in comparisons]


def test_answers_meet_both_sides_of_their_own_probe_and_nothing_of_the_judge_tells_whose_they_are() -> None:
    probes = [Probe("health", "a?", "four", "sixsix"), Probe("work", "b?", "x", "xxx")]
    answers = pd.DataFrame({"prompt": ["a?", "b?"], "start": ["12345", "22"], "policy": ["123", "4444"]})
    judge = Shortest()
    found = scored(answers, probes, judge)
    assert found["topic"].tolist() == ["health", "work"]
    assert found["start_score"].tolist() == [0.5, 0.5] and found["policy_score"].tolist() == [1, 0]
    assert {(one.prompt, one.second) for one in judge.asked} == {
        ("a?", "sixsix"), ("a?", "four"), ("b?", "xxx"), ("b?", "x"),
    }  # fmt: skip
    assert {one.first for one in judge.asked} == {"12345", "22", "123", "4444"}


def test_the_regression_has_not_seen_the_probe_it_judges() -> None:
    """The one probe whose words are turned round is ordered as all others are, which is wrong for it."""
    good, bad = "warm and kind words here", "cold and rude words here"
    probes = [Probe("health", f"{number}?", f"{good} {number}", f"{bad} {number}") for number in range(6)]
    turned = Probe("health", "turned?", bad, good)
    judge = LeftOutJudge([*probes, turned])
    verdicts = judge.compare([Comparison(one.prompt, one.chosen, one.rejected) for one in [*probes, turned]])
    assert [verdict.preference for verdict in verdicts] == [1] * 6 + [0]


def test_a_language_model_is_told_the_positions_and_another_position_makes_another_judge(
    project: Path, tmp_path: Path
) -> None:
    llm = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "instructions": "Be fair."}
    evaluate = Evaluate.model_validate({"judge": "llm", "llm": llm, "topics": {}})
    topics = palms.read_topics(SHIPPED / "topics.yaml")
    other = [topics[0].model_copy(update={"position": "Something else."}), *topics[1:]]
    probes = palms.read_probes(SHIPPED / "probes.jsonl", topics)
    found = [judge_of(evaluate, known, probes, None, tmp_path).identity for known in (topics, topics, other)]
    assert found[0] == found[1] != found[2]
