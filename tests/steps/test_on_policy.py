"""The policy step by PPO, RLOO, GRPO and SPO, on the tiny project's reward model: what it leaves, how it may run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from trl import RLOOTrainer

from steps import group_policy, ppo
from steps.backbone import Rows, add_adapter, evaluating, token_log_probs
from steps.config import load
from steps.implicit_rewards import HeldOut
from steps.lm_head import add_labelled_lm_head
from steps.models import ADAPTER, load_policy, load_reward_model, load_tokenizer
from steps.reward_model import Reading, reward_scores
from steps.reward_scorers import CarefulScorer
from steps.rollouts import SAMPLES, prompts_of
from steps.self_play import preferences, win_rates
from steps.tracking import Spool, curves
from steps.trainer_fields import ON_GROUPS

METHODS = ("ppo", *ON_GROUPS)


def inputs(finished: Path) -> dict[str, Path]:
    """What the policy step reads, of a project that has run."""
    store, data = finished / "var/store", finished / "data/tiny"
    return {
        **{name: next(store.glob(f"{name}-*")) for name in ("base", "sft", "reward")},
        **{name: data / f"{name}.parquet" for name in ("preferences", "demonstrations")},
    }


def tuned(finished: Path, out: Path, method: str = "ppo", dtype: str = "float32", *sets: str) -> dict[str, Any]:
    """The step's facts; its artifact lies in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = load(finished / "recipes/tiny.yaml", [f"policy.method={method}", *sets])
    given: dict[str, Any] = {**inputs(finished), "seed": 3, "out": out, "tracker": Spool(out)}
    if method == "ppo":
        return ppo.tune_policy(recipe.policy.ppo, dtype, **given)
    given.pop("demonstrations")
    return group_policy.tune_policy(recipe.policy.groups, method, dtype, **given)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_an_adapter_facts_and_curves(finished: Path, tmp_path: Path, method: str) -> None:
    facts = tuned(finished, tmp_path, method)
    assert facts["method"] == method
    assert facts["rollouts"] == {"ppo": 4, "rloo": 3, "grpo": 3, "spo": 3}[method]
    start = load_file(inputs(finished)["sft"] / ADAPTER / "adapter_model.safetensors")
    now = load_file(tmp_path / ADAPTER / "adapter_model.safetensors")
    assert now.keys() == start.keys()
    assert all(not torch.equal(now[name], start[name]) for name in now)
    found = curves(tmp_path)
    assert {"reward", "entropy", "completion_length", "eval_rewards/accuracies", "eval_rewards/chosen"} <= set(found)
    assert len(found["reward"]) == facts["rollouts"]
    assert [name for name in found if "completions/" in name] == []


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_the_distance_is_told_in_nats_an_answer_which_is_what_its_alarm_reads(
    finished: Path, tmp_path: Path, method: str
) -> None:
    tuned(finished, tmp_path, method, "float32", f"policy.{method}.trainer.beta=0.1")
    found = {name: [value for _, value in points] for name, points in curves(tmp_path).items()}
    tokens = [kl / each for kl, each in zip(found["kl"][1:], found["kl_per_token"][1:], strict=True)]
    assert tokens == pytest.approx(found["completion_length"][1:])


def test_without_a_penalty_the_implicit_rewards_are_told_in_nats(finished: Path, tmp_path: Path) -> None:
    facts = tuned(finished, tmp_path, "ppo", "float32", "policy.ppo.kl.coefficient=0")
    assert facts["eval_rewards/margins"] != 0


def test_ppo_reports_what_its_users_look_for(finished: Path, tmp_path: Path) -> None:
    facts = tuned(finished, tmp_path)
    found = curves(tmp_path)
    names = {"kl", "kl_error", "kl_coefficient", "clip_fraction", "value_loss", "policy_loss", "explained_variance"}
    assert {*names, "ended", "critic_grad_norm"} <= set(found)
    assert found["kl"][0][1] == pytest.approx(0, abs=1e-5)
    assert facts["reward_deviation"] > 0
    assert [step for step, _ in found["eval_rewards/accuracies"]] == [8, 16]  # rollout 2 of 4 updates each, and the end


def test_samples_are_a_table_that_grows(finished: Path, tmp_path: Path) -> None:
    tuned(finished, tmp_path)
    table = json.loads((tmp_path / f"{SAMPLES}.json").read_text())
    assert table["columns"] == ["step", "prompt", "answer", "reward", "tokens", "ended", "kl"]
    assert [row[0] for row in table["data"]] == [0] * 16 + [8] * 16
    told = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [entry["path"] for entry in told if entry.get("table")] == ["samples.json", "samples.json"]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes(finished: Path, tmp_path: Path, method: str) -> None:
    tuned(finished, tmp_path / "a", method)
    tuned(finished, tmp_path / "b", method)
    files = [(tmp_path / name / ADAPTER / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("method", ["rloo", "spo"])
def test_groups_go_on_where_they_were_interrupted(finished: Path, tmp_path: Path, method: str) -> None:
    tuned(finished, tmp_path / "straight", method)
    shutil.copytree(tmp_path / "straight/checkpoints", tmp_path / "resumed/checkpoints")
    shutil.rmtree(tmp_path / "resumed/checkpoints/checkpoint-3")
    assert (tmp_path / "resumed/checkpoints/checkpoint-2").is_dir()
    tuned(finished, tmp_path / "resumed", method)
    folders = ("straight", "resumed")
    files = [(tmp_path / name / ADAPTER / "adapter_model.safetensors").read_bytes() for name in folders]
    assert files[0] == files[1]
    told = [dict(curves(tmp_path / name)["reward"]) for name in folders]
    assert told[1] == {3: told[0][3]}


def test_spo_tells_the_reward_models_scores_and_learns_from_win_rates(finished: Path, tmp_path: Path) -> None:
    facts = tuned(finished, tmp_path, "spo", "float32", "policy.rloo.samples_every=1")
    table = json.loads((tmp_path / f"{SAMPLES}.json").read_text())
    rows = pd.DataFrame(table["data"], columns=table["columns"])
    found = {name: [value for _, value in points] for name, points in curves(tmp_path).items()}
    assert list(rows["step"].unique()) == [0, 1, 2] and len(rows) == 3 * 8
    for number, (_, answers) in enumerate(rows.groupby("step")):
        assert answers["reward"].mean() == pytest.approx(found["reward"][number], abs=1e-5)
        rewards = answers["reward"].to_numpy().reshape(2, 4)
        assert answers["prompt"].nunique() == 2
        expected = win_rates(preferences(rewards))
        assert answers["win_rate"].to_numpy() == pytest.approx(expected.ravel(), abs=1e-5)
        assert found["win_rate_deviation"][number] == pytest.approx(expected.std(), abs=1e-5)
        assert found["win_rate_best"][number] == pytest.approx(expected.max(1).mean(), abs=1e-5)
    assert facts["win_rate_deviation"] == pytest.approx(found["win_rate_deviation"][-1])
    assert found["kl_per_token"][0] == pytest.approx(0, abs=1e-5)


def self_play(members: Tensor, elsewhere: Tensor | None = None) -> tuple[Tensor, np.ndarray]:
    """(B,) rewards and (P, 4) win rates of groups of four, of (N, B) scores here and those of a second process."""
    made = object.__new__(group_policy.SelfPlayTrainer)
    everywhere = members if elsewhere is None else torch.cat([members, elsewhere], 1)
    made.accelerator = SimpleNamespace(gather=lambda here: everywhere.T)
    made.reward_funcs, made.num_generations = [SimpleNamespace(members=members)], 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RLOOTrainer, "_calculate_rewards", lambda self, *inputs: everywhere.mean(0)[:, None])
        return made._calculate_rewards([], [], [], [])[:, 0], made.win_rates


def test_a_group_that_is_spread_over_two_processes_is_compared_as_one() -> None:
    members = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    whole = self_play(members)
    rewards, rates = whole
    spread = self_play(members[:, :6], members[:, 6:])
    assert torch.equal(spread[0], rewards) and np.array_equal(spread[1], rates)
    assert rates == pytest.approx(win_rates(preferences(members.view(3, 3, 4).numpy()).mean(0)))
    assert rewards.numpy() == pytest.approx(0.75 * rates.ravel(), abs=1e-7)


def test_self_play_reads_log_odds_whatever_scale_the_reward_has(finished: Path) -> None:
    """Normalised, the differences of an ensemble's scores say no longer how likely an answer is preferred."""
    given = inputs(finished)
    model = load_policy(given["base"], "float32", given["sft"] / ADAPTER, trainable=True)
    tokenizer = load_tokenizer(given["base"])
    scorer = group_policy.reward_scorer(model, given["base"], "float32", given["reward"] / ADAPTER)
    twice = CarefulScorer([scorer, scorer], Reading(mean=0.5, deviation=0.25, answers=8, members=2, penalty=1.0))
    asked = (["rain 1: ", "bread 2: "], None, [tokenizer(words)["input_ids"] for words in ("good warm", "bad")])
    alone, normalised = (group_policy.ComparedReward(of, tokenizer, 1) for of in (scorer, twice))
    assert alone(*asked) == pytest.approx(group_policy.AnswerReward(scorer, tokenizer, 1)(*asked), abs=1e-6)
    assert normalised(*asked) == pytest.approx([(score - 0.5) / 0.25 for score in alone.latest.tolist()], abs=1e-5)
    torch.testing.assert_close(alone.members[0], alone.latest)
    torch.testing.assert_close(normalised.members, alone.members.expand(2, 2))


def test_one_backbone_and_models_apart_are_one_thing(finished: Path, tmp_path: Path) -> None:
    """Adapters over one base, or four models: equal to float error."""
    shared = tuned(finished, tmp_path / "a")
    apart = tuned(finished, tmp_path / "b", "ppo", "float32", "policy.ppo.backbone=separate")
    assert apart["reward_mean"] == pytest.approx(shared["reward_mean"], abs=1e-5)
    for name in ("reward", "kl", "explained_variance"):
        values = [[value for _, value in curves(tmp_path / folder)[name]] for folder in "ab"]
        assert values[0] == pytest.approx(values[1], rel=2e-2, abs=2e-3)


def test_a_base_in_four_bits_is_trained(finished: Path, tmp_path: Path) -> None:
    facts = tuned(finished, tmp_path, "ppo", "nf4")
    start = load_file(inputs(finished)["sft"] / ADAPTER / "adapter_model.safetensors")
    now = load_file(tmp_path / ADAPTER / "adapter_model.safetensors")
    assert all(not torch.equal(now[name].float(), start[name].float()) for name in now)
    assert facts["steps"] == 16


def test_four_bits_compute_alike_in_training_and_out_of_it(tmp_path: Path) -> None:
    """Also where the processor has a faster way without gradients, which it takes for widths of 32."""
    model = load_policy(tiny.make_base(tmp_path / "wide", width=64, spread=0.2), "nf4")
    ids = torch.arange(20, 40).view(2, 10)
    with torch.no_grad():
        model.eval()
        asked = model(ids).logits
        model.train()
        assert torch.equal(model(ids).logits, asked)


@pytest.mark.parametrize("padding", ["a token of its own", "the end"])
def test_the_reward_is_the_reward_models(finished: Path, padding: str) -> None:
    """As the evaluation computes it, from text, by another way; also where answers end with what pads them."""
    given = inputs(finished)
    recipe = load(finished / "recipes/tiny.yaml", ["policy.method=ppo"])
    tokenizer = load_tokenizer(given["base"])
    if padding == "the end":
        tokenizer.pad_token = tokenizer.eos_token
    models = ppo.load_models(recipe.policy.ppo, "float32", given["base"], given["sft"], given["reward"])
    prompts, answers = ["rain 1: ", "bread and rain 2: "], ["good warm", "bad"]
    ids = [tokenizer(answer)["input_ids"] for answer in answers]
    reward = ppo.AnswerReward(models.reward, tokenizer, 1)
    alone = load_reward_model(given["base"], "float32", given["reward"] / ADAPTER)
    alone.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    expected = reward_scores(alone, tokenizer, prompts, answers)
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)
    assert reward(prompts, None, ids) == pytest.approx(expected, abs=1e-5)
    ended = [[*row, tokenizer.eos_token_id] for row in ids]
    assert reward(prompts, None, ended) == pytest.approx(expected, abs=1e-5)


def test_implicit_rewards_of_the_start_are_nought(finished: Path) -> None:
    given = inputs(finished)
    model = load_policy(given["base"], "float32", given["sft"] / ADAPTER, trainable=True)
    add_labelled_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    pairs = pd.read_parquet(given["preferences"]).head(9)
    held_out = HeldOut(pairs, load_tokenizer(given["base"]), lambda rows: token_log_probs(model, rows)[0], batch=4)
    measured = held_out.measure(model, 0.3)
    assert measured == {
        "eval_rewards/chosen": 0.0,
        "eval_rewards/rejected": 0.0,
        "eval_rewards/margins": 0.0,
        "eval_rewards/accuracies": 0.5,
    }


def test_implicit_rewards_are_measured_with_nothing_dropped_out(finished: Path) -> None:
    given = inputs(finished)
    base = load_policy(given["base"], "float32")
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False))
    add_labelled_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    model.train()
    pairs = pd.read_parquet(given["preferences"]).head(9)
    with torch.no_grad(), evaluating(model):
        held_out = HeldOut(pairs, load_tokenizer(given["base"]), lambda rows: token_log_probs(model, rows)[0])
    assert held_out.measure(model, 1.0)["eval_rewards/margins"] == 0.0
    assert model.training and all(module.training for module in model.modules() if isinstance(module, nn.Dropout))


def test_an_answers_likelihood_is_that_of_its_tokens_and_its_end(finished: Path) -> None:
    given = inputs(finished)
    model, tokenizer = load_policy(given["base"], "float32"), load_tokenizer(given["base"])
    add_labelled_lm_head(model, outputs=("log_probs", "entropy"))
    prompt, answer = tokenizer("rain: ")["input_ids"], tokenizer("good")["input_ids"] + [tokenizer.eos_token_id]
    rows = Rows.of([prompt, prompt[:2]], [answer, answer[:1]], tokenizer.pad_token_id)
    log_probs, entropy = token_log_probs(model, rows)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, :-1].log_softmax(-1)
    expected = logits[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs[0], expected)
    exact = -(logits.exp() * logits).sum(-1)[len(prompt) - 1 :]
    assert entropy is not None
    torch.testing.assert_close(entropy[0], exact)
    assert log_probs[1, 1:].tolist() == [0.0] * (len(answer) - 1)


def test_prompts_come_once_each_and_again_where_they_are_few(tmp_path: Path) -> None:
    table = pd.DataFrame({"prompt": ["b", "a", "b", "c"], "part": ["train", "train", "train", "held_out"]})
    table.to_parquet(tmp_path / "preferences.parquet")
    assert prompts_of(tmp_path / "preferences.parquet", 1) == ["b", "a"]
    assert prompts_of(tmp_path / "preferences.parquet", 5) == ["b", "a"] * 3


def test_rows_join_left_padded_prompts_and_right_padded_answers() -> None:
    prompts = torch.tensor([[0, 0, 5], [6, 7, 8]])
    answers = torch.tensor([[9, 1, 0], [2, 3, 1]])
    rows = Rows.joined(prompts, (prompts > 0).long(), answers, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert rows.ids.tolist() == [[5, 9, 1, *rows.ids[0, 3:].tolist()], [6, 7, 8, 2, 3, 1]]
    assert rows.mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert rows.completion_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert rows.labels.tolist() == [[-100, 9, 1, -100, -100, -100], [-100, -100, -100, 2, 3, 1]]


def test_an_adapter_that_does_not_fit_is_refused(finished: Path) -> None:
    given = inputs(finished)
    model = load_policy(given["base"], "float32", given["sft"] / ADAPTER, trainable=True)
    add_adapter(model, "copy", "default")
    from steps.backbone import load_adapter

    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(model, "copy", {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(1)})


# -- several processes -------------------------------------------------------------------------------------------

WORKER = """
import sys; sys.path.insert(0, {tests!r})
import json, tiny_ppo
from pathlib import Path
from steps.tracking import NullTracker
from steps.training import run_trainer
made = tiny_ppo.trainer(Path({base!r}), Path({out!r}), trainer={trainer!r}, rollouts=4)
run_trainer(made, NullTracker())
if made.accelerator.is_main_process:
    keep = ("reward", "kl", "value_loss", "explained_variance", "policy_loss", "entropy", "grad_norm")
    logs = [{{k: e[k] for k in keep}} for e in made.state.log_history if "reward" in e]
    Path({out!r}, "logs.json").write_text(json.dumps(logs))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def curve(base: Path, out: Path, processes: int, batch: int) -> list[dict[str, float]]:
    """Logs of the toy's PPO in so many processes."""
    out.mkdir()
    trainer = {"per_device_train_batch_size": batch, "steps_per_generation": 1, "num_iterations": 3}
    values = {"tests": str(tiny.REPOSITORY / "tests"), "base": str(base), "out": str(out), "trainer": trainer}
    script = out / "worker.py"
    script.write_text(WORKER.format(**values))
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "OMP_NUM_THREADS": "1"}
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
    command = [sys.executable, *(several if processes > 1 else []), str(script)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tiny.REPOSITORY)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((out / "logs.json").read_text())


def test_two_processes_are_one_with_the_doubled_batch(base: Path, tmp_path: Path) -> None:
    one, two = curve(base, tmp_path / "one", 1, 8), curve(base, tmp_path / "two", 2, 4)
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-3)
