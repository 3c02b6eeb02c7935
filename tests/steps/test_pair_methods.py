"""Relatives of DPO on the tiny project: what they leave, what they pay at the start, that they resume bit for bit."""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from steps import training
from steps.config import load
from steps.errors import DataError, Interrupted
from steps.kto import WholeBatches, labelled_rows
from steps.models import ADAPTER, load_policy, load_tokenizer
from steps.pair_methods import LOSSES, Likelihoods
from steps.pairs import training_and_held_out
from steps.pipeline import POLICIES
from steps.policy_config import RELATIVES
from steps.reward_model import MEMBER, Reading, RewardModel
from steps.reward_scorers import reward_scorer
from steps.rollouts import AnswerReward
from steps.slic import CANDIDATES, best_against_others, draw_candidates, with_targets
from steps.tracking import NullTracker, Spool, curves
from steps.trainer_fields import REFERENCE_FREE

WEIGHTS = Path(ADAPTER) / "adapter_model.safetensors"
LN2 = math.log(2)
CHEAP = ["policy.slic_sample_rank.candidates=3", "policy.slic_sample_rank.max_new_tokens=8"]


@pytest.fixture(scope="module")
def given(finished: Path) -> dict[str, Path]:
    """What the policy step may read, of a project that has run."""
    store, data = finished / "var/store", finished / "data/tiny"
    return {
        "recipe": finished / "recipes/tiny.yaml",
        **{name: next(store.glob(f"{name}-*")) for name in ("base", "sft", "reward")},
        **{f"data/{name}": data / f"{name}.parquet" for name in ("preferences", "demonstrations")},
    }


def tuned(
    given: dict[str, Path], out: Path, method: str, *sets: str, tracker: Any = None, **other: Path
) -> dict[str, Any]:
    """The step's facts; its artifact lies in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    step = POLICIES[method]
    module, _, name = step.function.partition(":")
    relative = load(given["recipe"], [f"policy.method={method}", *CHEAP, *sets]).policy.relative
    inputs = {argument: {**given, **other}[name] for argument, name in step.inputs.items() if name != "start"}
    function = getattr(importlib.import_module(module), name)
    return function(relative, method, "float32", **inputs, seed=3, out=out, tracker=tracker or Spool(out))


@pytest.fixture(scope="module")
def ran(given: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict, Path]]:
    """A method's facts and artifact, from a run nobody disturbed; every method runs once."""
    found: dict[str, tuple[dict, Path]] = {}

    def run(method: str) -> tuple[dict, Path]:
        if method not in found:
            out = tmp_path_factory.mktemp(method)
            found[method] = (tuned(given, out, method, "policy.dpo.trainer.logging_steps=1"), out)
        return found[method]

    return run


@pytest.mark.parametrize("method", RELATIVES)
def test_a_method_leaves_an_adapter_facts_and_the_curves_all_share(
    ran: Callable[[str], tuple[dict, Path]], given: dict[str, Path], method: str
) -> None:
    facts, out = ran(method)
    assert (facts["method"], facts["steps"], facts["held_out"], facts["start"]) == (method, 8, 32, "sft")
    start, now = load_file(given["sft"] / WEIGHTS), load_file(out / WEIGHTS)
    assert now.keys() == start.keys()
    assert all(not torch.equal(now[name], start[name]) for name in now)
    found = curves(out)
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert {f"eval_{name}" for name in rewards} <= set(found)
    assert {"loss", "logps/chosen", "logps/rejected", "entropy"} <= set(found)
    told = rewards & set(found)
    if method in REFERENCE_FREE:
        assert not told
    else:
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins"} <= told
    assert facts["eval_rewards/margins"] == pytest.approx(facts["eval_rewards/chosen"] - facts["eval_rewards/rejected"])


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("ipo", 25.0),  # (0 − 1/2τ)² at τ = 0.1
        ("cdpo", LN2),
        ("robust", LN2),  # (0.9 − 0.1) ln 2 / (1 − 2 · 0.1)
        ("rso", 1.0),
        ("kto", 0.5),  # 1 − σ(0)
    ],
)
def test_at_the_start_a_method_with_a_reference_pays_what_it_does_on_paper(
    ran: Callable[[str], tuple[dict, Path]], method: str, loss: float
) -> None:
    _, out = ran(method)
    assert curves(out)["loss"][0] == (1, pytest.approx(loss, rel=1e-5))


def answers_likelihood(given: dict[str, Path], prompts: list[str], answers: list[str]) -> tuple[torch.Tensor, ...]:
    """(n,) log π of answers under the SFT model, token by token through its plain head, and their lengths."""
    model, tokenizer = (
        load_policy(given["base"], "float32", given["sft"] / ADAPTER).eval(),
        load_tokenizer(given["base"]),
    )
    sums, lengths = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        asked, ids = tokenizer(prompt)["input_ids"], [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        said = log_p.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)[len(asked) - 1 :]
        sums.append(said.sum())
        lengths.append(len(said))
    return torch.stack(sums), torch.tensor(lengths)


@pytest.mark.parametrize("method", ["simpo", "cpo", "orpo", "slic"])
def test_at_the_start_a_method_without_one_pays_by_the_start_models_likelihoods(
    given: dict[str, Path], tmp_path: Path, method: str
) -> None:
    """One batch of all pairs there are, and one demonstration, so that what is in it is known."""
    only = pd.read_parquet(given["data/demonstrations"]).head(1)
    only.to_parquet(tmp_path / "one.parquet")
    sets = ["policy.dpo.pairs=8", "policy.dpo.trainer.max_steps=1", "policy.dpo.trainer.logging_steps=1"]
    tuned(given, tmp_path, method, *sets, **{"data/demonstrations": tmp_path / "one.parquet"})
    relative = load(given["recipe"], [f"policy.method={method}", *sets]).policy.relative
    pairs, _, _ = training_and_held_out(given["data/preferences"], relative)
    chosen, chosen_lengths = answers_likelihood(given, pairs["prompt"], pairs["chosen"])
    rejected, rejected_lengths = answers_likelihood(given, pairs["prompt"], pairs["rejected"])
    targets, _ = answers_likelihood(given, list(only["prompt"]) * 8, list(only["completion"]) * 8)
    batch = Likelihoods(chosen, rejected, chosen_lengths, rejected_lengths, chosen - rejected, targets)
    expected = float(LOSSES[method](batch, relative.loss).mean())
    assert curves(tmp_path)["loss"][0] == (1, pytest.approx(expected, rel=1e-4))


class StopsAfter(Spool):
    """A tracker that asks the training to stop once so many steps are done."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(folder)
        self.steps, self.done = steps, 0

    def progress(self, phase: str, done: int, total: int, values: Any = None) -> None:
        self.done = done if phase == "training" else self.done


@pytest.mark.parametrize("method", RELATIVES)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    ran: Callable[[str], tuple[dict, Path]],
    given: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    facts, straight = ran(method)
    tracker = StopsAfter(tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(training, "stop_requested", lambda: tracker.done >= tracker.steps)
        with pytest.raises(Interrupted):
            tuned(given, tmp_path, method, "policy.dpo.trainer.logging_steps=1", tracker=tracker)
    resumed = tuned(given, tmp_path, method, "policy.dpo.trainer.logging_steps=1")
    assert (tmp_path / WEIGHTS).read_bytes() == (straight / WEIGHTS).read_bytes()
    assert resumed == facts
    assert curves(tmp_path) == curves(straight)


def test_a_champion_is_a_start_for_them_too(
    ran: Callable[[str], tuple[dict, Path]], given: dict[str, Path], tmp_path: Path
) -> None:
    """Without an update the policy is the champion, measured against the SFT model."""
    _, champion = ran("cdpo")
    for method in ("orpo", "kto"):
        out = tmp_path / method
        out.mkdir()
        relative = load(
            given["recipe"],
            [f"policy.method={method}", "policy.dpo.trainer.max_steps=1", "policy.dpo.trainer.learning_rate=0"],
        ).policy.relative
        step = POLICIES[method]
        module, _, name = step.function.partition(":")
        inputs = {argument: given[name] for argument, name in step.inputs.items() if name != "start"}
        facts = getattr(importlib.import_module(module), name)(
            relative, method, "float32", **inputs, start=champion, seed=3, out=out, tracker=NullTracker()
        )
        assert (out / WEIGHTS).read_bytes() == (champion / WEIGHTS).read_bytes()
        assert facts["eval_rewards/margins"] != 0


# -- SLiC-HF -----------------------------------------------------------------------------------------------------


def test_the_best_candidate_stands_against_every_other_one() -> None:
    table = pd.DataFrame(
        {
            "prompt": ["p"] * 4 + ["q"] * 3 + ["r"] * 2,
            "answer": ["a", "b", "b", "c", "d", "e", "f", "same", "same"],
            "reward": [0.1, 0.9, 0.9, 0.5, 3.0, 2.0, 1.0, 0.0, 0.0],
        }
    )
    found = best_against_others(table)
    assert [tuple(row) for row in found.to_numpy()] == [
        ("p", "b", "a"),
        ("p", "b", "c"),
        ("q", "d", "e"),
        ("q", "d", "f"),
    ]


def test_ranked_samples_are_kept_and_learnt_from(ran: Callable[[str], tuple[dict, Path]]) -> None:
    facts, out = ran("slic_sample_rank")
    table = pd.read_parquet(out / CANDIDATES)
    assert len(table) == facts["candidates"] == 3 * facts["ranked_prompts"]
    assert table.groupby("prompt")["answer"].nunique().max() == 3  # each candidate has random numbers of its own
    assert facts["pairs"] == len(best_against_others(table))


def ensemble(reward: Path, out: Path, penalty: float = 1.0) -> Path:
    """The tiny reward model and two further members of other minds, less so many standard deviations, on a scale."""
    shutil.copytree(reward / ADAPTER, out / ADAPTER)
    for number, factor in enumerate((-1.5, 0.25), start=1):
        folder = out / ADAPTER / MEMBER.format(number)
        shutil.copytree(reward / ADAPTER, folder)
        weights = load_file(folder / "adapter_model.safetensors")
        weights = {name: factor * value if "lora_B" not in name else value for name, value in weights.items()}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    Reading(mean=0.5, deviation=2.0, answers=8, members=3, penalty=penalty).write(out / ADAPTER)
    return out


def test_candidates_are_ranked_by_what_an_ensemble_is_sure_of(given: dict[str, Path], tmp_path: Path) -> None:
    reward, tokenizer = ensemble(given["reward"], tmp_path / "careful"), load_tokenizer(given["base"])
    pairs = pd.read_parquet(given["data/preferences"]).head(12)
    prompts, answers = list(pairs["prompt"]), list(pairs["chosen"])
    policy = load_policy(given["base"], "float32", given["sft"] / ADAPTER)
    score = AnswerReward(reward_scorer(policy, given["base"], "float32", reward / ADAPTER), tokenizer, 5)
    model = RewardModel(given["base"], "float32", reward / ADAPTER)
    careful = model.careful_scores(prompts, answers)
    assert score(prompts, None, tokenizer(answers)["input_ids"]) == pytest.approx(careful, abs=1e-5)
    assert (model.scores(prompts, answers) - careful).min() > 1e-3  # else nobody would see the penalty

    relative = load(given["recipe"], ["policy.method=slic_sample_rank", *CHEAP, "policy.dpo.pairs=12"]).policy.relative
    inputs = {"base": given["base"], "sft": given["sft"], "preferences": given["data/preferences"]}
    careless = ensemble(given["reward"], tmp_path / "careless", penalty=0.0)
    tables = [
        draw_candidates(relative, "float32", **inputs, reward=reward, seed=3, tracker=NullTracker())
        for reward in (reward, careless)
    ]
    assert tables[0]["answer"].equals(tables[1]["answer"])
    assert (tables[1]["reward"] - tables[0]["reward"]).min() > 1e-3


def test_each_pair_gets_a_demonstration_of_like_length(given: dict[str, Path], tmp_path: Path) -> None:
    relative = load(given["recipe"], ["policy.method=slic"]).policy.relative
    train, _, _ = training_and_held_out(given["data/preferences"], relative)
    made = with_targets(train, relative, given["data/demonstrations"], given["base"], seed=1)
    lengths = [len(a) + len(b) for a, b in zip(made["target_prompt_ids"], made["target_ids"], strict=True)]
    assert lengths == sorted(lengths)
    tokenizer, table = load_tokenizer(given["base"]), pd.read_parquet(given["data/demonstrations"])
    said = set(table["prompt"] + table["completion"])
    rows = zip(made["target_prompt_ids"], made["target_ids"], strict=True)
    assert {tokenizer.decode([*asked, *answer[:-1]]) for asked, answer in rows} <= said
    chosen = load(given["recipe"], ["policy.method=slic", "policy.slic.target=chosen"]).policy.relative
    assert with_targets(train, chosen, given["data/demonstrations"], given["base"], 1) is train
    table.head(0).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no demonstrations to hold on to"):
        with_targets(train, relative, tmp_path / "none.parquet", given["base"], 1)


# -- KTO ---------------------------------------------------------------------------------------------------------


def test_a_batch_holds_both_labels_and_no_neighbour_answers_the_same_prompt(given: dict[str, Path]) -> None:
    relative = load(given["recipe"], ["policy.method=kto"]).policy.relative
    pairs, _, _ = training_and_held_out(given["data/preferences"], relative)
    rows = labelled_rows(pairs, 8, seed=3).to_list()
    for first in range(0, len(rows) - 7, 8):
        assert [row["label"] for row in rows[first : first + 8]] == [True] * 4 + [False] * 4
    liked = sorted((row["prompt"], row["completion"]) for row in rows if row["label"])
    assert liked == sorted(zip(pairs["prompt"], pairs["chosen"], strict=True))
    unliked = sorted((row["prompt"], row["completion"]) for row in rows if not row["label"])
    assert unliked == sorted(zip(pairs["prompt"], pairs["rejected"], strict=True))


def test_batches_stay_whole_and_come_in_another_order_each_epoch() -> None:
    sampler = WholeBatches(18, 4, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(18))
    assert first[16:] == [16, 17]
    for place in range(0, 16, 4):
        assert first[place : place + 4] == list(range(first[place], first[place] + 4))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize("method", ["ipo", "simpo", "kto"])
def test_a_prompt_that_is_too_long_costs_no_pair_and_no_answer(
    given: dict[str, Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL would leave out a row whose prompt alone fills `max_length`, and cut the answers of the others."""
    table = pd.read_parquet(given["data/preferences"])
    long = tmp_path / "long.parquet"
    table.assign(prompt="and so on " * 5 + table["prompt"]).to_parquet(long)
    module, seen = importlib.import_module("steps.kto" if method == "kto" else "steps.dpo"), []

    def caught(trainer: Any, tracker: Any) -> None:
        seen.append(trainer.train_dataset)
        raise Interrupted("seen enough")

    monkeypatch.setattr(module, "run_trainer", caught)
    longest = 48
    with pytest.raises(Interrupted):
        tuned(given, tmp_path, method, f"policy.dpo.trainer.max_length={longest}", **{"data/preferences": long})
    (rows,) = seen
    pairs = training_and_held_out(long, load(given["recipe"], [f"policy.method={method}"]).policy.relative)[0]
    assert len(rows) == len(pairs) * (2 if method == "kto" else 1)
    sides = ("completion_ids",) if method == "kto" else ("chosen_ids", "rejected_ids")
    end = load_tokenizer(given["base"]).eos_token_id
    assert {row[side][-1] for row in rows for side in sides} == {end}
    assert max(training.row_lengths(rows)) == longest and min(len(row["prompt_ids"]) for row in rows) > 0
