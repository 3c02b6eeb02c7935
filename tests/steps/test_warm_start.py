"""Training that begins at the champion while the reference stays the SFT model."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steps.config import assigned, load
from steps.experiment import Experiment
from steps.registry import Version, adapter_digest

STILL = 1e-30  # a learning rate at which no weight of float32 moves


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project, to write into."""
    root = tmp_path_factory.mktemp("warm") / "project"
    shutil.copytree(finished, root)
    return root


@pytest.fixture
def champion(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The facts of the finished project's policy, which is the champion."""
    (policy,) = (path for path in (project / "var/store").glob("policy-*") if champions(path))
    (base,) = (project / "var/store").glob("base-*")
    tags = {"policy_digest": adapter_digest(policy), "base_digest": manifest(base)["digest"]}
    monkeypatch.setattr("steps.registry.champion", lambda client, name: Version(name, "1", "run", tags))
    monkeypatch.setattr("steps.registry.fetch_adapter", lambda client, version, into: policy)
    yield manifest(policy)["facts"]


def manifest(artifact: Path) -> dict[str, Any]:
    return json.loads((artifact / "manifest.json").read_text())


def champions(policy: Path) -> bool:
    return manifest(policy)["facts"]["start"] == "sft" and manifest(policy)["facts"]["method"] == "dpo"


def experiment(root: Path, told: io.StringIO, **changes: Any) -> Experiment:
    recipe = assigned(load(root / "recipes/tiny.yaml"), {k.replace("__", "."): v for k, v in changes.items()})
    made = Experiment(recipe, root, Console(file=told, width=100))
    list(made.plan())  # finds the data and the steps that are there; runs nothing
    return made


def test_dpo_begins_at_the_champions_implicit_rewards(project: Path, champion: dict[str, Any]) -> None:
    """Steps that move nothing leave the champion, so its own rewards against the SFT model are measured again."""
    told = io.StringIO()
    rate = {"policy__dpo__trainer__learning_rate": STILL, "policy__dpo__trainer__max_steps": 1}
    run = experiment(project, told, policy__start="champion", policy__dpo__trainer__logging_steps=1, **rate)
    artifact = run.run("policy").artifact
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert artifact.facts[f"eval_rewards/{name}"] == pytest.approx(champion[f"eval_rewards/{name}"], rel=1e-4)
    assert abs(artifact.facts["eval_rewards/margins"]) > 1e-3  # so it is not the SFT model's, which is 0
    assert artifact.facts["start"] == "champion"
    assert "training starts at models:/tiny/1" in " ".join(told.getvalue().split())
    first = next(entry for entry in journal(artifact.path) if "rewards/margins" in entry.get("values", {}))
    assert abs(first["values"]["rewards/margins"]) > 1e-3  # before the first update, where DPO from SFT has 0


@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo", "spo"])
def test_the_reference_of_other_methods_stays_too(project: Path, champion: dict[str, Any], method: str) -> None:
    """β log(π/ρ) of the same held-out pairs is DPO's times the ratio of the two β: 0.05, and TRL's 0.1 for DPO."""
    shared = "ppo" if method == "ppo" else "rloo"
    changes = {f"policy__{shared}__rollouts": 1, f"policy__{shared}__trainer__learning_rate": STILL}
    run = experiment(project, io.StringIO(), policy__method=method, policy__start="champion", **changes)
    facts = run.run("policy").artifact.facts
    assert facts["eval_rewards/margins"] == pytest.approx(0.5 * champion["eval_rewards/margins"], rel=1e-3)
    assert facts["start"] == "champion"
    if method == "ppo":
        assert facts["kl"] != 0  # of the first rollout, before any update


def test_the_champions_digest_is_part_of_the_key(project: Path, champion: dict[str, Any]) -> None:
    cold, warm = (experiment(project, io.StringIO(), policy__start=start) for start in ("sft", "champion"))
    assert cold.spec("policy").key != warm.spec("policy").key
    assert cold.store.find(cold.spec("policy"))
    assert warm.spec("policy").inputs["start"].digest == warm._start.tags["policy_digest"]  # type: ignore[union-attr]


def test_without_a_champion_training_begins_at_the_sft_model_and_says_so(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steps.registry.champion", lambda client, name: None)
    told = io.StringIO()
    run = experiment(project, told, policy__start="champion")
    assert run.run("policy").reused  # the same step as with policy.start=sft
    assert "no champion yet, training starts at the SFT model" in " ".join(told.getvalue().split())


def test_an_adapter_of_another_shape_is_refused(project: Path, champion: dict[str, Any]) -> None:
    from steps.errors import ModelError
    from steps.models import load_policy
    from steps.warm_start import begin_at

    (base,) = (project / "var/store").glob("base-*")
    (sft,) = (project / "var/store").glob("sft-*")
    policy = load_policy(base, "float32", sft / "adapter", trainable=True)
    other = project / "other"
    shutil.copytree(sft / "adapter", other / "adapter")
    settings = other / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "lora_alpha": 16}))
    with pytest.raises(ModelError, match="lora_alpha 16, the recipe's 8"):
        begin_at(policy, other, base, "float32")


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
