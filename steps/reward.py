"""The reward model: a number per answer, such that people's choices become likely."""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from steps.artifact import Facts
from steps.config import Lora, Reward
from steps.models import load_reward_model, load_tokenizer, lora_config, save_adapter
from steps.pairs import training_and_held_out
from steps.statistics import wilson
from steps.tracking import Tracker
from steps.training import LengthGrouped, arguments, held_out_metrics, run_trainer


class BradleyTerryTrainer(LengthGrouped, RewardTrainer):
    """TRL's RewardTrainer, which minimises −log σ(r(x, y_w) − r(x, y_l)), with the two rewards logged apart."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if model.training else "eval"
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        rewards = self.accelerator.gather_for_metrics(outputs.logits.detach().float().squeeze(-1))
        for name, values in zip(("rewards/chosen", "rewards/rejected"), rewards.chunk(2), strict=True):
            self._metrics[mode][name].append(values.mean().item())
        return (loss, outputs) if return_outputs else loss


def train_reward(
    reward: Reward, lora: Lora, dtype: str, *, base: Path, preferences: Path, seed: int, out: Path, tracker: Tracker
) -> Facts:
    """Fit adapters and a scalar head to human comparisons (Bradley–Terry; InstructGPT, arXiv:2203.02155, eq. 1).

    Args:
        preferences: table of prompt, chosen, rejected, margin, part.
    """
    train, held_out, batch = training_and_held_out(preferences, reward)
    set_seed(seed)
    model, adapters = load_reward_model(base, dtype), lora_config(lora, base, "SEQ_CLS")
    trainer = BradleyTerryTrainer(
        model,
        args=arguments(RewardConfig, reward.trainer, seed=seed, out=out, per_device_eval_batch_size=batch),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=load_tokenizer(base),
        peft_config=adapters,
    )
    run_trainer(trainer, tracker)
    measured = held_out_metrics(trainer, tracker)
    save_adapter(trainer.model, base, out)
    accuracy = measured["eval_rewards/accuracies"]
    low, high = wilson(accuracy * len(held_out), len(held_out))
    return {
        "pairs": len(train),
        "held_out": len(held_out),
        "steps": trainer.state.global_step,
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        **measured,
    }
