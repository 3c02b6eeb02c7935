"""What PPO costs: seconds a rollout against TRL's last PPO, and peak memory against LoRA SFT of the same rows.

`python -m benchmarks.ppo_cost` prints the memory; `python -m benchmarks.ppo_cost PEER` the seconds too, where PEER is
the Python of an environment with trl==1.12.0, the last release that has a PPO. The default job's base model has to be
there (`make run`). Each measurement is a process of its own. Model, adapters, batch, lengths and epochs are the same:
32 answers of 24 tokens to prompts of 16, two minibatches, two epochs. TRL's policy has the adapters, its reference is
the base with them off, and its reward and value models are models of their own, the latter trained where ours is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROLLOUTS, ANSWERS, MINIBATCH, EPOCHS, PROMPT, ANSWER = 3, 32, 16, 2, 16, 24
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": list(range(20, 30))}
WORDS = ["the", "film", "about", "a", "quiet", "street", "where", "people", "sing", "of", "bread", "and", "rain"]


def base() -> str:
    found = [path for path in Path("var/store").glob("base-*") if (path / "manifest.json").is_file()]
    return str(found[0]) if found else sys.exit("no base model: run `make run` first")


def token_rows(tokenizer, length: int, count: int) -> list[list[int]]:
    """Rows of exactly so many tokens."""
    texts = [" ".join(WORDS[(row + place) % len(WORDS)] for place in range(4 * length)) for row in range(count)]
    return [ids[:length] for ids in tokenizer(texts)["input_ids"]]


class Clock:
    """Seconds between a trainer's reports; the first, which also warms up, is left out."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        self.times: list[float] = []
        clock = self

        class Noted(TrainerCallback):
            def on_log(self, *args, **kwargs):
                clock.times.append(time.perf_counter())

        self.callback = Noted()

    def seconds(self) -> float:
        return (self.times[ROLLOUTS - 1] - self.times[0]) / (ROLLOUTS - 1)


def ours() -> float:
    """Seconds a rollout of our PPO."""
    import torch
    from peft import LoraConfig, get_peft_model
    from trl.trainer import grpo_trainer

    from steps.backbone import Scorer, add_adapter, linear_head
    from steps.frozen_layers import remember_frozen_layers
    from steps.lm_head import labelled_lm_head
    from steps.models import load_policy, load_tokenizer
    from steps.policy_config import PPO
    from steps.ppo_trainer import REFERENCE, PPOConfig, PPOTrainer
    from steps.rollouts import AnswerReward, prompt_rows, rollout_arguments

    folder = Path(base())
    tokenizer = load_tokenizer(folder)
    model = get_peft_model(load_policy(folder, "float32"), LoraConfig(task_type="CAUSAL_LM", **LORA))
    for name in (REFERENCE, "reward", "critic"):
        add_adapter(model, name, "default")
    head = torch.randn(1, model.config.hidden_size) / 24
    reward, critic = (Scorer(model, name, linear_head(head)) for name in ("reward", "critic"))
    settings = {"per_device_train_batch_size": MINIBATCH, "steps_per_generation": ANSWERS // MINIBATCH}
    settings |= {"num_iterations": EPOCHS, "max_completion_length": ANSWER, "temperature": 1.0, "save_strategy": "no"}
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch, labelled_lm_head(grpo_trainer):
        ppo = PPO(rollouts=ROLLOUTS, trainer=settings)
        args = rollout_arguments(PPOConfig, ppo, {}, seed=0, out=Path(scratch), disable_dropout=True)
        trainer = PPOTrainer(
            model,
            AnswerReward(reward, tokenizer, MINIBATCH),
            critic=critic,
            ppo=ppo,
            memories=[memory for memory in [remember_frozen_layers(model, 20)] if memory],
            args=args,
            train_dataset=prompt_rows([tokenizer.decode(ids) for ids in token_rows(tokenizer, PROMPT, ANSWERS)]),
            processing_class=tokenizer,
            callbacks=[clock.callback],
        )
        trainer.eos_token_ids = [model.config.vocab_size - 1]  # a token nobody draws: answers have one length
        trainer.train()
    return clock.seconds()


def peer() -> float:
    """Seconds a rollout of TRL 1.12's PPO; runs in that environment."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    folder = base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1) for _ in "ab"
    )
    for name, parameter in value.named_parameters():
        place = int(name.split(".")[2]) if ".layers." in name else -1
        trained = "score" in name or (place >= 20 and any(part in name for part in LORA["target_modules"]))
        parameter.requires_grad_(trained)
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        args = PPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=ANSWERS,  # TRL's PPO calls so what a rollout holds
            num_mini_batches=ANSWERS // MINIBATCH,
            gradient_accumulation_steps=1,
            num_ppo_epochs=EPOCHS,
            response_length=ANSWER,
            total_episodes=ROLLOUTS * ANSWERS,
            local_rollout_forward_batch_size=MINIBATCH,
            num_sample_generations=0,
            temperature=1.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        rows = Dataset.from_dict({"input_ids": token_rows(tokenizer, PROMPT, ANSWERS)})
        trainer = PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=model,
            ref_model=None,
            reward_model=reward,
            value_model=value,
            train_dataset=rows,
            eval_dataset=rows,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
            callbacks=[clock.callback],
        )
        trainer.train()
    return clock.seconds()


def sft() -> float:
    """Seconds an optimizer step of SFT on rows as long as PPO's, in minibatches of the same size."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig
    from trl.trainer import sft_trainer

    from steps.lm_head import labelled_lm_head
    from steps.models import load_policy, load_tokenizer
    from steps.sft import LengthGroupedSFTTrainer
    from steps.training import arguments

    folder = Path(base())
    tokenizer = load_tokenizer(folder)
    rows = [tokenizer.decode(ids) for ids in token_rows(tokenizer, PROMPT + ANSWER, 4 * MINIBATCH)]
    clock = Clock()
    settings = {"per_device_train_batch_size": MINIBATCH, "max_steps": ROLLOUTS, "logging_steps": 1}
    with tempfile.TemporaryDirectory() as scratch, labelled_lm_head(sft_trainer):
        trainer = LengthGroupedSFTTrainer(
            load_policy(folder, "float32"),
            args=arguments(SFTConfig, {**settings, "save_strategy": "no"}, seed=0, out=Path(scratch)),
            train_dataset=Dataset.from_dict({"text": rows}),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
            callbacks=[clock.callback],
        )
        trainer.train()
    return clock.seconds()


def measured(what: str, python: str = sys.executable) -> tuple[float, float]:
    """(seconds, peak GiB) of one of the functions above in a process of its own."""
    from steps.launch import thread_environment

    environment = {**os.environ, **thread_environment(None), "PYTHONPATH": str(Path.cwd())}
    command = [python, "-m", "benchmarks.ppo_cost", "--only", what]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(ran.stderr[-3000:])
    found = json.loads(ran.stdout.splitlines()[-1])
    return found["seconds"], found["peak"] / 2**20


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--only"]:
        import resource

        seconds = {"ours": ours, "peer": peer, "sft": sft}[arguments[1]]()
        print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
        return
    plain, mine = measured("sft"), measured("ours")
    print(f"peak memory: SFT {plain[1]:.2f} GiB, PPO {mine[1]:.2f} GiB, ratio {mine[1] / plain[1]:.2f}")
    if arguments:
        theirs = measured("peer", arguments[0])
        print(f"a rollout: TRL 1.12 {theirs[0]:.1f} s, ours {mine[0]:.1f} s, ratio {mine[0] / theirs[0]:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
