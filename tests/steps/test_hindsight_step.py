"""The policy step by Chain of Hindsight on the tiny project, and whoever samples from what it leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from trl import SFTConfig
from trl.trainer import sft_trainer

from steps import registry, report
from steps.artifact import payload
from steps.baseline import read
from steps.chain_of_hindsight import Chains, tune_policy
from steps.config import load
from steps.divergence import divergence
from steps.errors import PrefloopError
from steps.experiment import Experiment
from steps.hindsight import BAD, GOOD, Chain, draws_of, visible
from steps.lm_head import labelled_lm_head
from steps.models import ADAPTER, is_whole_model, load_policy, load_tokenizer
from steps.policy_prompt import asked_after
from steps.registry import Version, adapter_digest
from steps.sampling import draw_tokens, sample, uniforms_of
from steps.sft import LengthGroupedSFTTrainer
from steps.tracking import NullTracker, Spool, curves
from steps.training import arguments

PRAISE = "\nGood:\n"
SETTINGS = """policy.chain_of_hindsight={held_out: 32, sft_coefficient: 0.5, hidden_least: 0.2, hidden_most: 0.4,
  trainer: {learning_rate: 1e-2, per_device_train_batch_size: 8, max_steps: 16, logging_steps: 2, save_steps: 5}}"""
METHOD = ["policy.method=chain_of_hindsight", SETTINGS]


@pytest.fixture(scope="module")
def flow(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The tiny recipe up to the evaluation, its policy tuned by Chain of Hindsight."""
    root = Path(shutil.copytree(finished, tmp_path_factory.mktemp("hindsight") / "project", symlinks=True))
    made = Experiment(load(root / "recipes/tiny.yaml", METHOD), root, Console(quiet=True), meets_champion=False)
    made.prepare_data()
    for step in made.recipe.STEPS[:-1]:
        made.run(step)
    return made


def inputs(flow: Experiment) -> dict[str, Path]:
    """What the policy step reads."""
    steps = {name: flow.known[name].path for name in ("base", "sft")}
    return {**steps, **{name: flow.known[f"data/{name}"].path for name in ("preferences", "demonstrations")}}


def tuned(flow: Experiment, out: Path, *sets: str, spool: Spool | None = None, **given: Path) -> dict[str, Any]:
    """The step's facts, worked once more in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    config = load(flow.root / "recipes/tiny.yaml", [*METHOD, *sets]).policy.chain_of_hindsight
    read = {**inputs(flow), **given}
    return tune_policy(config, "float32", **read, seed=flow.recipe.seed, out=out, tracker=spool or Spool(out))


# -- what is learnt ----------------------------------------------------------------------------------------------


def test_the_step_leaves_an_adapter_how_it_is_asked_facts_and_curves(flow: Experiment) -> None:
    artifact = flow.outcomes["policy"].artifact
    assert asked_after(artifact.path / ADAPTER) == artifact.facts["prompt_after"] == PRAISE
    assert (artifact.facts["method"], artifact.facts["start"], artifact.facts["held_out"]) == (
        "chain_of_hindsight", "sft", 32,
    )  # fmt: skip
    start = load_file(flow.known["sft"].path / ADAPTER / "adapter_model.safetensors")
    now = load_file(artifact.path / ADAPTER / "adapter_model.safetensors")
    assert now.keys() == start.keys()
    assert all(not torch.equal(now[name], start[name]) for name in now)
    found = curves(artifact.path)
    assert {"loss", "loss/good", "loss/bad", "loss/sft", "eval_loss/good", "eval_loss/bad"} <= set(found)
    assert {"eval_rewards/chosen", "eval_rewards/accuracies", "classification_accuracy"} <= set(found)
    for name in ("loss/good", "loss/bad"):
        assert found[name][-1][1] < found[name][0][1]


def test_the_report_says_how_the_policy_is_asked(flow: Experiment) -> None:
    facts = {name: flow.outcomes[name].artifact.facts for name in ("evaluate", "policy")}
    (how,) = (sentence for sentence in report.findings(facts) if "prompt.json" in sentence)
    assert r"`'\nGood:\n'` goes behind every prompt" in how
    (tells,) = (sentence for sentence in report.findings(facts) if "tells the better answer" in sentence)
    assert f"{facts['policy']['classification_accuracy']:.1%}" in tells


def test_before_any_update_the_implicit_reward_is_that_of_the_words_alone(flow: Experiment, tmp_path: Path) -> None:
    """log ρ(y | x, f) − log ρ(y | x), here by transformers' own forward; without words it is nought."""
    still = "policy.chain_of_hindsight.trainer.learning_rate=0"
    once = "policy.chain_of_hindsight.trainer.max_steps=1"
    plain = tuned(flow, tmp_path / "plain", still, once, 'policy.chain_of_hindsight.templates=["{good}"]')
    assert [plain[f"eval_rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")] == [0, 0, 0, 0.5]
    assert "classification_accuracy" not in plain
    facts = tuned(flow, tmp_path / "words", still, once)
    given = inputs(flow)
    model, tokenizer = (
        load_policy(given["base"], "float32", given["sft"] / ADAPTER).eval(),
        load_tokenizer(given["base"]),
    )
    pairs = pd.read_parquet(given["preferences"])
    pairs = pairs[pairs["part"] == "held_out"].head(32)

    def log_prob(prompt: str, answer: str) -> float:
        asked, said = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
        return float(logits.gather(1, torch.tensor(said)[:, None]).sum())

    expected = [log_prob(p + PRAISE, a) - log_prob(p, a) for p, a in zip(pairs["prompt"], pairs["chosen"], strict=True)]
    assert facts["eval_rewards/chosen"] == pytest.approx(0.1 * np.mean(expected), rel=1e-4)


def test_one_template_without_feedback_is_plain_fine_tuning_on_chosen_answers(flow: Experiment, tmp_path: Path) -> None:
    """Two updates on the whole of eight pairs: TRL's own trainer on prompts and completions has the same losses."""
    settings = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    sets = [f"policy.chain_of_hindsight.trainer={json.dumps(settings)}", "policy.chain_of_hindsight.pairs=8"]
    sets += ['policy.chain_of_hindsight.templates=["{good}"]', "policy.chain_of_hindsight.sft_coefficient=0"]
    tuned(flow, tmp_path / "chains", *sets)
    given = inputs(flow)
    pairs = pd.read_parquet(given["preferences"])
    pairs = pairs[pairs["part"] == "train"].head(8)
    with labelled_lm_head(sft_trainer):
        plain = LengthGroupedSFTTrainer(
            load_policy(given["base"], "float32", given["sft"] / ADAPTER, trainable=True),
            args=arguments(SFTConfig, settings, seed=0, out=tmp_path / "plain"),
            train_dataset=Dataset.from_dict({"prompt": list(pairs["prompt"]), "completion": list(pairs["chosen"])}),
            processing_class=load_tokenizer(given["base"]),
        )
    plain.train()
    expected = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    found = curves(tmp_path / "chains")
    assert [value for _, value in found["loss"]] == pytest.approx(expected, rel=1e-5)
    assert [value for _, value in found["loss/good"]] == pytest.approx(expected, rel=1e-5)
    assert "loss/bad" not in found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_bad_answer_is_predicted_without_what_is_hidden(flow: Experiment, attention: str) -> None:
    """Whatever stands in the hidden places, the tokens after the good answer are as likely; the good answer's not."""
    from steps.chain_of_hindsight import HindsightTrainer

    model = load_policy(flow.known["base"].path, "float32").eval()
    model.set_attn_implementation(attention)
    answers = {GOOD: [30, 31, 32, 1], BAD: [40, 41, 1]}
    chains = [
        Chain.of((GOOD, BAD), [[20, 21], [22]], {**answers, GOOD: good}) for good in ([30, 31, 32, 1], [50, 60, 70, 1])
    ]
    chains = [Chain(one.ids, one.sides, one.blind_from, hidden=(2, 3, 4, 5)) for one in chains]  # the whole answer
    bare = HindsightTrainer.__new__(HindsightTrainer)
    bare.model = model
    mask = bare._attention(torch.from_numpy(visible(chains)).unsqueeze(1))
    with torch.no_grad():
        logits = model(torch.tensor([one.ids for one in chains]), attention_mask=mask).logits
        plain = model(torch.tensor([one.ids for one in chains])).logits
    torch.testing.assert_close(logits[0, 6:], logits[1, 6:])
    torch.testing.assert_close(logits[0, :6], plain[0, :6])
    assert not torch.allclose(plain[0, 6:], plain[1, 6:], atol=1e-3)


def test_a_batch_depends_on_seed_row_and_epoch_alone(flow: Experiment) -> None:
    config = flow.recipe.policy.chain_of_hindsight
    tokenizer = load_tokenizer(flow.known["base"].path)
    chains = Chains(config, tokenizer, 3, None)
    pairs = [
        {"row": row, "prompt": f"rain {row}: ", "good_ids": [*range(30, 45), 1], "bad_ids": [5, 1]} for row in range(6)
    ]
    before = torch.random.get_rng_state()
    together, alone = chains(pairs), [chains([pair]) for pair in reversed(pairs)][::-1]
    assert torch.equal(torch.random.get_rng_state(), before)
    for row, one in enumerate(alone):
        width = one["input_ids"].shape[1]
        for name in ("input_ids", "labels", "sides"):
            assert together[name][row, :width].tolist() == one[name][0].tolist()
    drawn = {epoch: [chains.chain(pair, draws_of(3, pair["row"], epoch)) for pair in pairs] for epoch in (0, 1)}
    assert drawn[0] != drawn[1]
    assert len({one.ids[: one.sides.index(GOOD)] for one in drawn[0] if one.sides.index(GOOD) < one.blind_from}) > 1
    assert any(one.hidden for one in drawn[0])
    assert "visible" in together


def test_a_chain_that_is_too_long_is_cut(flow: Experiment) -> None:
    chains = Chains(flow.recipe.policy.chain_of_hindsight, load_tokenizer(flow.known["base"].path), 3, max_length=20)
    pair = {"row": 0, "prompt": "rain: ", "good_ids": [*range(30, 60), 1], "bad_ids": [5, 1]}
    batch = chains([pair])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["sides"].shape == (1, 20)


# -- interrupted, and whole models -------------------------------------------------------------------------------


class Dying(Spool):
    """Ends the step's work, as a kill would, when its last update is reported."""

    def metrics(self, values, step) -> None:
        if step >= 16 and "loss" in values:
            raise KeyboardInterrupt
        super().metrics(values, step)


def test_a_resumed_run_ends_with_the_bytes_of_the_straight_one(flow: Experiment, tmp_path: Path) -> None:
    """Stopped in the second epoch, whose templates and hidden tokens are others than the first one's."""
    pairs = flow.outcomes["policy"].artifact.facts["pairs"]
    assert 16 * 8 > pairs > 5 * 8
    with pytest.raises(KeyboardInterrupt):
        tuned(flow, tmp_path, spool=Dying(tmp_path))
    assert (tmp_path / "checkpoints/checkpoint-15").is_dir()
    assert 15 % -(-pairs // 8) != 0  # within an epoch
    tuned(flow, tmp_path)
    made = {path: file.read_bytes() for path, file in payload(tmp_path / ADAPTER).items()}
    straight = payload(flow.outcomes["policy"].artifact.path / ADAPTER)
    assert made == {path: file.read_bytes() for path, file in straight.items()}


def test_every_weight_is_trained_and_praise_tells_kind_words_from_unkind_ones(flow: Experiment, tmp_path: Path) -> None:
    """The start is a whole model, which has learnt nothing: what it knows of kindness, it has from the feedback."""
    base = flow.known["base"].path
    shutil.copytree(base, tmp_path / "sft" / ADAPTER)
    out = tmp_path / "out"
    words = 'policy.chain_of_hindsight.templates=["+{good}-{bad}", "-{bad}+{good}"]'
    facts = tuned(flow, out, words, "policy.chain_of_hindsight.trainer.max_steps=40", sft=tmp_path / "sft")
    assert is_whole_model(out / ADAPTER)
    assert asked_after(out / ADAPTER) == "+"
    old, new = (load_file(folder / "model.safetensors") for folder in (tmp_path / "sft" / ADAPTER, out / ADAPTER))
    assert [name for name in old if torch.equal(old[name], new[name])] == []
    assert 0.5 < facts["classification_accuracy_low"] < facts["classification_accuracy"] <= 1
    assert facts["eval_loss/good"] < 3.5 < np.log(258)  # of a model that knows nothing


# -- whoever samples from it -------------------------------------------------------------------------------------


def test_the_policy_is_asked_with_praise_and_the_judge_sees_the_prompt_alone(flow: Experiment) -> None:
    table = pd.read_parquet(flow.outcomes["evaluate"].artifact.path / "completions.parquet")
    prompts = list(pd.read_parquet(flow.known["data/prompts"].path)["prompt"].head(16))
    assert list(table["prompt"]) == prompts
    base, recipe = flow.known["base"].path, flow.recipe
    model = load_policy(base, "float32", flow.known["policy"].path / ADAPTER)
    tokenizer = load_tokenizer(base)

    def said(after: str) -> list[str]:
        asked = [prompt + after for prompt in prompts]
        return sample(model, tokenizer, asked, recipe.evaluate, recipe.seed, NullTracker(), "").texts

    assert list(table["policy"]) == said(PRAISE) != said("")
    assert list(table["start"]) == read(flow.known["baseline"].path)[recipe.evaluate.temperature].texts


def test_the_distance_is_that_of_what_people_get_from_what_they_got(flow: Experiment) -> None:
    """KL(ρ(· | x, f) ‖ ρ(· | x)) of one token in closed form: above 0, though no weight differs."""
    base = flow.known["base"].path
    model, tokenizer = load_policy(base, "float32").eval(), load_tokenizer(base)
    plainly = tokenizer(["rain: ", "bread 12: "])["input_ids"]
    asked = tokenizer([f"rain: {PRAISE}", f"bread 12: {PRAISE}"])["input_ids"]
    with torch.no_grad():
        own, theirs = (
            [model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in ones] for ones in (asked, plainly)
        )
    expected = [float((a.exp() * (a - b)).sum()) for a, b in zip(own, theirs, strict=True)]
    answers = draw_tokens(model, asked, uniforms_of(0, 0, 2, 1), 1.0, [1], 0)
    found = divergence(model, model, asked, answers, 1.0, 0, start_prompts=plainly)
    assert found.full == pytest.approx(np.mean(expected), rel=1e-4)
    assert found.full > 1e-4
    assert divergence(model, model, asked, answers, 1.0, 0).full == pytest.approx(0, abs=1e-7)


def test_a_method_that_trains_without_words_cannot_begin_at_such_a_champion(
    flow: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, base = flow.known["policy"], flow.known["base"]
    tags = {"policy_digest": adapter_digest(policy.path), "base_digest": base.digest}
    monkeypatch.setattr(registry, "champion", lambda client, name: Version(name, "1", "run", tags))
    monkeypatch.setattr(registry, "fetch_adapter", lambda client, version, into: policy.path)

    def planned(*sets: str) -> list[str]:
        recipe = load(flow.root / "recipes/tiny.yaml", [*sets, "policy.start=champion"])
        experiment = Experiment(recipe, flow.root, Console(quiet=True), meets_champion=False)
        return [plan.what for plan in experiment.plan() if plan.step == "policy"]

    with pytest.raises(PrefloopError, match="dpo cannot begin at the champion"):
        planned()
    assert planned(*METHOD) == ["run"]
