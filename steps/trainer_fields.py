"""The field names of TRL's trainer configurations, read from source so that nothing heavy is imported."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

REFERENCE_FREE = ("simpo", "cpo", "orpo", "slic", "slic_sample_rank")
ON_PAIRS = ("dpo", "ipo", "cdpo", "robust", "rso", *REFERENCE_FREE)  # methods that are losses of TRL's DPOTrainer
ON_GROUPS = ("rloo", "grpo", "spo")  # methods that hold several answers to a prompt against each other
# The losses TRL's DPOTrainer has, for `loss_type`.
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED = ("aot", "aot_unpaired", "exo_pair", "robust")  # those of them that `label_smoothing` does something to
CONFIGS = {
    "sft": ("trl/trainer/sft_config.py", "SFTConfig"),
    "reward": ("trl/trainer/reward_config.py", "RewardConfig"),
    **dict.fromkeys(ON_PAIRS, ("trl/trainer/dpo_config.py", "DPOConfig")),
    "kto": ("trl/trainer/kto_config.py", "KTOConfig"),
    "ppo": ("trl/trainer/grpo_config.py", "GRPOConfig"),
    "rloo": ("trl/trainer/rloo_config.py", "RLOOConfig"),
    "grpo": ("trl/trainer/grpo_config.py", "GRPOConfig"),
    "spo": ("trl/trainer/rloo_config.py", "RLOOConfig"),
    "chain_of_hindsight": ("trl/trainer/sft_config.py", "SFTConfig"),
}
# Where the classes those inherit from are defined.
PARENTS = {
    "_BaseConfig": "trl/trainer/base_config.py",
    "TrainingArguments": "transformers/training_args.py",
}
# What the pipeline decides itself; a recipe that sets one of these would be overruled in silence.
OWNED = {
    "output_dir": "a step writes into its own artifact",
    "seed": "set the recipe's `seed`",
    "data_seed": "set the recipe's `seed`",
    "report_to": "metrics go to MLflow through the tracker",
    "run_name": "runs are named after the step",
    "resume_from_checkpoint": "a step always resumes from its newest whole checkpoint",
    "trust_remote_code": "code that comes with a model is never run",
    "model_init_kwargs": "set `model` in the recipe",
    "push_to_hub": "models go to the MLflow registry",
    "hub_token": "models go to the MLflow registry",
    "hub_model_id": "models go to the MLflow registry",
    "save_total_limit": "the three newest checkpoints are kept, and none once the step is done",
    "use_cpu": "a GPU is used where there is one",
    "per_device_eval_batch_size": "chosen so that all held-out batches are full",
    "disable_tqdm": "progress is drawn by prefloop",
}

_ROLLOUTS = dict.fromkeys(("max_steps", "num_train_epochs"), "set the method's `rollouts`")
_WHOLE = "answers are drawn from the whole distribution, else the likelihood ratio would be biased"
_SAMPLED = {
    **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty"), _WHOLE),
    **dict.fromkeys(("generation_kwargs", "cache_implementation"), "answers are drawn by `steps.sampling`"),
    "shuffle_dataset": "prompts come in an order drawn from the seed",
}
_GROUPED = {"train_sampling_strategy": "batches are of like length, in an order drawn from the seed"}
_CRITIC = "a critic's value is the baseline, not a group of answers"
_NAMED = dict.fromkeys(("loss_type", "loss_weights"), "the method is its loss; `policy.method: dpo` takes any of TRL's")
_OURS = {
    **_NAMED,
    **_GROUPED,
    **dict.fromkeys(
        ("ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting"), "it belongs to TRL's losses"
    ),
    "precompute_ref_log_probs": "the reference is asked once, before the first update",
    "sync_ref_model": "the reference stays the SFT model",
}
_FREE = {
    **_OURS,
    "beta": "the scale `rewards/*` are told on, which is `policy.dpo`'s; the loss's own stands beside `trainer`",
    "label_smoothing": "the loss has none",
}
_CHAINED = "a row is a chain of answers, made anew in each epoch (set `templates`)"
_CHAINS = (
    *("packing", "packing_strategy", "padding_free", "eval_packing", "assistant_only_loss", "completion_only_loss"),
    *("dataset_text_field", "dataset_kwargs", "dataset_num_proc", "shuffle_dataset", "chat_template_path"),
    *("truncation_mode", "pad_to_multiple_of", "remove_unused_columns", "dataloader_persistent_workers"),
)
# The same of single trainers.
OWNED_OF: dict[str, dict[str, str]] = {
    "sft": _GROUPED,
    "reward": _GROUPED,
    "dpo": _GROUPED,
    "ipo": {**_NAMED, **_GROUPED, "label_smoothing": "the loss has none"},
    "rso": {**_NAMED, **_GROUPED, "label_smoothing": "the loss has none"},
    "robust": {**_NAMED, **_GROUPED},
    "cdpo": _OURS,
    **dict.fromkeys(REFERENCE_FREE, _FREE),
    "kto": {
        **dict.fromkeys(("eval_strategy", "eval_steps", "eval_on_start"), "held-out pairs are measured at the end"),
        "train_sampling_strategy": "batches stay as they are, in an order drawn from the seed",
        "precompute_ref_log_probs": "the reference is asked once, before the first update",
        "sync_ref_model": "the reference stays the SFT model",
    },
    "rloo": {**_ROLLOUTS, **_SAMPLED},
    "chain_of_hindsight": {
        **_GROUPED,
        **dict.fromkeys(_CHAINS, _CHAINED),
        **dict.fromkeys(("eos_token", "pad_token"), "the base's tokenizer has them"),
        **dict.fromkeys(("eval_strategy", "eval_steps", "eval_on_start"), "held-out pairs are measured at the end"),
    },
    "grpo": {**_ROLLOUTS, **_SAMPLED},
    "spo": {
        **_ROLLOUTS,
        **_SAMPLED,
        "reward_clip_range": "a win rate lies between 0 and 1",
        "reward_weights": "there is one reward model",
    },
    "ppo": {
        **_ROLLOUTS,
        **_SAMPLED,
        **dict.fromkeys(("num_generations", "scale_rewards", "loss_type", "importance_sampling_level"), _CRITIC),
        "beta": "set `kl.coefficient`",
        "epsilon_high": "the ratio is clipped alike on both sides, by `epsilon`",
        "entropy_coef": "set `entropy_coefficient`",
        "use_adaptive_entropy": "set `entropy_coefficient`",
        "top_entropy_quantile": "every token is learnt from",
        "mask_truncated_completions": "set `missing_eos_penalty`",
        "disable_dropout": "nothing is dropped out, else the likelihood ratio would not be 1 at first",
        "delta": "the ratio is clipped by `epsilon`",
        "reward_weights": "there is one reward model",
        "sync_ref_model": "the reference stays the start policy",
    },
}


def owned_of(kind: str) -> dict[str, str]:
    """What a recipe may not set of a trainer's configuration, and what decides it."""
    return {**OWNED, **OWNED_OF.get(kind, {})}


def _source(relative: str) -> Path:
    package, _, rest = relative.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(package)
    return Path(spec.submodule_search_locations[0]) / rest


@functools.cache
def fields_of(kind: str) -> frozenset[str]:
    """The dataclass fields of a trainer configuration, its parents' included.

    Args:
        kind: a key of `CONFIGS`.
    """
    relative, name = CONFIGS[kind]
    found: set[str] = set()
    pending = [(relative, name)]
    while pending:
        relative, name = pending.pop()
        tree = ast.parse(_source(relative).read_text(encoding="utf-8"))
        for node in tree.body:
            if not isinstance(node, ast.ClassDef) or node.name != name:
                continue
            found |= {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
            parents = [base.id for base in node.bases if isinstance(base, ast.Name)]
            pending += [(PARENTS[parent], parent) for parent in parents if parent in PARENTS]
    return frozenset(field for field in found if not field.startswith("_"))
