"""PPO's trainer: what must hold before the first update, of its gradients, and of every way to cut a batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_ppo
import torch
from transformers import TrainerCallback
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from steps.backbone import adapter_parameters, token_log_probs
from steps.losses import clipped_policy_loss, clipped_value_loss
from steps.ppo_trainer import CRITIC_FILE, REFERENCE, STATE_FILE, rows_of
from steps.tracking import NullTracker
from steps.training import is_whole, run_trainer


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def history(made, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


def trained(base: Path, out: Path, **settings):
    made = tiny_ppo.trainer(base, out, **settings)
    run_trainer(made, NullTracker())
    return made


# -- before the first update -------------------------------------------------------------------------------------


def test_before_the_first_update_the_ratio_is_one_and_the_kl_nought(base: Path, out: Path) -> None:
    made = tiny_ppo.trainer(base, out)
    for batch in tiny_ppo.prepared(made):
        rows = rows_of(batch)
        mask = rows.completion_mask
        now = made._log_probs(rows) * mask
        torch.testing.assert_close(now, batch["old_per_token_logps"], rtol=0, atol=1e-6)
        torch.testing.assert_close(made.reference_log_probs(rows) * mask, now, rtol=0, atol=1e-6)
    assert made._metrics["train"]["kl"] == [pytest.approx(0, abs=1e-5)]
    assert made._metrics["train"]["kl_k3"] == [pytest.approx(0, abs=1e-5)]


def test_the_first_loss_is_the_advantage_and_the_critics_error(base: Path, out: Path) -> None:
    """At ratio 1 the clipped loss is −mean Â, and white advantages have mean 0."""
    made = tiny_ppo.trainer(base, out, value_clip=None)
    batches = tiny_ppo.prepared(made)
    policy = sum(
        float(made._policy_loss(rows_of(b), b, rows_of(b).completion_mask.float(), b["tokens_per_update"]).detach())
        for b in batches
    )
    assert policy == pytest.approx(0, abs=1e-5)


def test_an_answer_is_drawn_the_same_whatever_is_drawn_beside_it(base: Path, out: Path) -> None:
    made = tiny_ppo.trainer(base, out)
    prompts = made.processing_class(tiny_ppo.PROMPTS[:8])["input_ids"]
    whole, _ = made._generate_single_turn(prompts, None, None, 1)
    assert made._generate_single_turn(prompts[:3], None, None, 1)[0] == whole[:3]


# -- gradients ---------------------------------------------------------------------------------------------------


def whole_loss(made, batches) -> torch.Tensor:
    """Policy and value loss of a rollout, written out on their own."""
    total = torch.zeros((), dtype=torch.float64)
    tokens = sum(rows_of(batch).completion_mask.sum() for batch in batches)
    for batch in batches:
        rows = rows_of(batch)
        mask = rows.completion_mask.double()
        log_probs, _ = token_log_probs(made.policy, rows)
        policy = clipped_policy_loss(log_probs, batch["old_per_token_logps"], batch["advantages"], made.epsilon_low)
        values = made.critic.values(rows)
        value = clipped_value_loss(values, batch["values"], batch["returns"], made.ppo.value_clip)
        total = total + ((policy + made.ppo.value_coefficient * value).double() * mask).sum() / tokens
    return total


def in_its_own_precision(norm, hidden):
    """A norm that does not go by way of single precision, as the library's does."""
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def test_the_gradient_is_that_of_finite_differences(base: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", in_its_own_precision)
    made = tiny_ppo.trainer(base, out, trainer={"steps_per_generation": 1, "per_device_train_batch_size": 8})
    made.policy.double()
    made.critic.head.double()
    (batch,) = tiny_ppo.prepared(made)
    with torch.no_grad():  # a step away from the start, where the clip bites
        for parameter in [*adapter_parameters(made.policy, "default"), *made.critic.parameters()]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss = made._compute_loss(made.model, batch)
    loss.backward()
    draw = torch.Generator().manual_seed(0)
    checked = 0
    for parameter in [*adapter_parameters(made.policy, "default"), *made.critic.parameters()]:
        direction = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        analytic = float((parameter.grad * direction).sum())
        with torch.no_grad():
            parameter.add_(1e-5 * direction)
            above = float(whole_loss(made, [batch]))
            parameter.sub_(2e-5 * direction)
            below = float(whole_loss(made, [batch]))
            parameter.add_(1e-5 * direction)
        assert analytic == pytest.approx((above - below) / 2e-5, rel=1e-5, abs=1e-8)
        checked += abs(analytic) > 1e-6
    assert checked >= 6


def test_policy_and_critic_learn_and_nothing_else_does(base: Path, out: Path) -> None:
    made = tiny_ppo.trainer(base, out)
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in made.policy.named_parameters()
        if ".default." not in name and ".critic." not in name
    }
    before = tiny_ppo.weights(made)
    run_trainer(made, NullTracker())
    after = tiny_ppo.weights(made)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert all(torch.equal(made.policy.get_parameter(name), value) for name, value in frozen.items())
    assert any(REFERENCE in name for name in frozen)


# -- one thing, said in two ways ---------------------------------------------------------------------------------


def test_four_batches_of_one_are_one_batch_of_four(base: Path, tmp_path: Path) -> None:
    whole = trained(base, tmp_path / "a", trainer={"steps_per_generation": 1, "num_iterations": 2})
    parts = trained(
        base,
        tmp_path / "b",
        trainer={
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "steps_per_generation": 4,
            "num_iterations": 2,
        },
    )
    assert history(whole, "reward") == pytest.approx(history(parts, "reward"))
    for name, value in tiny_ppo.weights(whole).items():
        torch.testing.assert_close(tiny_ppo.weights(parts)[name], value, rtol=1e-3, atol=2e-4)


def test_a_mix_of_weight_nought_is_no_mix(base: Path, tmp_path: Path) -> None:
    demonstrations = ([[5, 6]], [[7, 8, 1]])
    none = trained(base, tmp_path / "a")
    nought = trained(base, tmp_path / "b", more={"demonstrations": demonstrations})
    some = trained(base, tmp_path / "c", more={"demonstrations": demonstrations}, ptx_coefficient=1.0)
    for name, value in tiny_ppo.weights(none).items():
        assert torch.equal(tiny_ppo.weights(nought)[name], value)
    assert history(some, "ptx_loss")[-1] < history(some, "ptx_loss")[0]


def test_no_clip_for_the_value_is_a_clip_nothing_reaches(base: Path, tmp_path: Path) -> None:
    none, far = (trained(base, tmp_path / str(clip), value_clip=clip) for clip in (None, 1e9))
    for name, value in tiny_ppo.weights(none).items():
        torch.testing.assert_close(tiny_ppo.weights(far)[name], value, rtol=1e-4, atol=1e-6)


# -- what the parameters do --------------------------------------------------------------------------------------


def test_while_the_critic_warms_up_the_policy_stays(base: Path, out: Path) -> None:
    made = tiny_ppo.trainer(base, out, critic_warmup=3)
    before = tiny_ppo.weights(made)
    run_trainer(made, NullTracker())
    moved = {name for name, value in tiny_ppo.weights(made).items() if not torch.equal(before[name], value)}
    assert moved == {name for name in before if ".critic." in name or name.startswith("head.")}
    assert history(made, "kl") == pytest.approx([0, 0, 0], abs=1e-5)


class Changes(TrainerCallback):
    """Counts the optimizer steps that change the policy."""

    def __init__(self, made) -> None:
        self.parameters, self.count = adapter_parameters(made.policy, "default"), 0

    def on_step_begin(self, *args, **kwargs):
        self.before = [parameter.detach().clone() for parameter in self.parameters]

    def on_step_end(self, *args, **kwargs):
        self.count += any(not torch.equal(b, now) for b, now in zip(self.before, self.parameters, strict=True))


@pytest.mark.parametrize(("bound", "changes"), [(None, 36), (1e9, 36), (1e-11, 3)])
def test_an_update_stops_once_the_policy_has_moved_too_far(
    base: Path, out: Path, bound: float | None, changes: int
) -> None:
    """Of twelve steps a rollout, the first moves the policy further than any bound near nought."""
    made = tiny_ppo.trainer(base, out, trainer={"num_iterations": 6}, update_kl=bound)
    made.add_callback(counted := Changes(made))
    run_trainer(made, NullTracker())
    assert counted.count == changes


def test_an_entropy_bonus_keeps_answers_varied(base: Path, tmp_path: Path) -> None:
    peaked = {"temperature": 0.05}
    plain, bonus = (trained(base, tmp_path / str(c), trainer=peaked, entropy_coefficient=c) for c in (0.0, 3.0))
    assert history(bonus, "entropy")[-1] > history(plain, "entropy")[-1]


def test_a_cut_off_answer_pays(base: Path, out: Path) -> None:
    made = tiny_ppo.trainer(base, out, missing_eos_penalty=2.0, reward_clip=0.25)
    made.answer_reward.latest = torch.tensor([1.0, 0.1, -1.0])
    assert made._scores(torch.tensor([1.0, 0.0, 0.0])).tolist() == pytest.approx([0.25, -1.9, -2.25])


def test_kl_follows_its_target(base: Path, out: Path) -> None:
    made = trained(base, out, kl={"coefficient": 0.1, "target": 5.0}, rollouts=4)
    assert history(made, "kl_coefficient") == pytest.approx([0.1 * 0.98**n for n in range(4)], rel=1e-4)


# -- checkpoints -------------------------------------------------------------------------------------------------


class Kill(TrainerCallback):
    """Ends training as a kill would: between a checkpoint and what follows."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [4, 6, 9, 12, 15])  # an epoch has three rollouts of four updates each
def test_a_resumed_run_ends_with_the_bytes_of_the_straight_one(base: Path, tmp_path: Path, at: int) -> None:
    settings = {"kl": {"coefficient": 0.1, "target": 1.0}, "ptx_coefficient": 0.1, "rollouts": 5}
    more = {"demonstrations": ([[5, 6], [9]], [[7, 8, 1], [4, 1]])}
    straight = trained(base, tmp_path / "straight", more=more, **settings)
    killed = tiny_ppo.trainer(base, tmp_path / "killed", more=more, **settings)
    killed.add_callback(Kill(at))
    with pytest.raises(KeyboardInterrupt):
        run_trainer(killed, NullTracker())
    again = trained(base, tmp_path / "killed", more=more, **settings)
    assert history(again, "reward") == history(straight, "reward")
    for name, value in tiny_ppo.weights(straight).items():
        assert torch.equal(tiny_ppo.weights(again)[name], value), name


def test_checkpoints_lie_between_rollouts_only(base: Path, out: Path) -> None:
    trained(base, out, trainer={"save_steps": 3})
    steps = sorted(int(path.name.split("-")[1]) for path in (out / "checkpoints").glob("checkpoint-*"))
    assert steps == [4, 8, 12]  # due at 3, 6 and 9; the three newest are kept


@pytest.mark.parametrize("name", [CRITIC_FILE, STATE_FILE, "adapter_model.safetensors", "optimizer.pt"])
def test_a_checkpoint_without_one_of_its_parts_is_not_taken_for_whole(base: Path, out: Path, name: str) -> None:
    made = trained(base, out)
    newest = max((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert is_whole(newest, made.checkpoint_files)
    (newest / name).write_bytes((newest / name).read_bytes()[:20])
    assert not is_whole(newest, made.checkpoint_files)


def test_a_checkpoint_holds_the_controller(base: Path, out: Path) -> None:
    trained(base, out, kl={"coefficient": 0.1, "target": 5.0})
    newest = max((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert json.loads((newest / STATE_FILE).read_text())["coefficient"] == pytest.approx(0.1 * 0.98**3, rel=1e-4)
