"""What every trained step shares: arguments, progress, length-grouped batches, and resuming from whole checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from steps.errors import Interrupted, StepFailed
from steps.hindsight import IGNORED
from steps.launch import stop_requested
from steps.tracking import Tracker

Arguments = TypeVar("Arguments")

CHECKPOINTS = "checkpoints"
# TRL's defaults are made for a GPU: autocast over float32 weights, and recomputed activations.
DEFAULTS: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 5,
    "logging_nan_inf_filter": False,
    "save_steps": 20,
    "lr_scheduler_type": "linear",
}
ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")  # as TRL's trainers name them
# One file each that a checkpoint cannot be resumed without; trainer_state.json is written last of all.
CHECKPOINT_FILES = (
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "adapter_model.safetensors",
)
BEST = ("reward", "rewards/accuracies", "accuracy")  # a checkpoint is the better the higher the first of these is
# TRL's RewardTrainer names these its own way; one chart should hold every trainer.
NAMES = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
SILENT = ("runtime", "per_second", "total_flos", "num_tokens", "train_loss", "epoch")


def arguments(kind: type[Arguments], trainer: Mapping[str, Any], *, seed: int, out: Path, **fixed: Any) -> Arguments:
    """A TRL configuration: ours over TRL's defaults, the recipe's over ours, and what the pipeline decides on top.

    Raises:
        StepFailed: TRL refuses a value.
    """
    ours = {**DEFAULTS, **trainer}
    owned = {
        "output_dir": str(out / CHECKPOINTS),
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "save_total_limit": 3,
        "use_cpu": not torch.cuda.is_available(),
    }
    try:
        return kind(**{**ours, **owned, **fixed})
    except (TypeError, ValueError) as error:
        raise StepFailed(
            "TRL refuses the trainer's settings",
            where=f"{kind.__name__} (the recipe's `trainer:`)",
            have=str(error).strip().splitlines()[0],
            then="mend the recipe, then run again",
        ) from error


def even_batches(rows: int, at_most: int = 32) -> tuple[int, int]:
    """(rows to use, batch size) so that all batches are full: then a mean of batch means is the mean."""
    batch = min(rows, at_most)
    return rows // batch * batch, batch


class LengthGroupedSampler(Sampler[int]):
    """Batches of rows of like length, in an order drawn from (seed, epoch) alone, so that a resumed run repeats it.

    Args:
        lengths: (n,) tokens per row.
        batch: rows per optimizer step and process.
        pool: batches' worth of rows that are shuffled together before they are sorted by length.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, pool: int = 16) -> None:
        self.lengths, self.batch, self.seed, self.pool = lengths, batch, seed, pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=draw).tolist()
        size = self.batch * self.pool
        pools = [sorted(order[i : i + size], key=self.lengths.__getitem__) for i in range(0, len(order), size)]
        batches = [rows[i : i + self.batch] for rows in pools for i in range(0, len(rows), self.batch)]
        whole = [rows for rows in batches if len(rows) == self.batch]
        rest = [rows for rows in batches if len(rows) < self.batch]
        for place in torch.randperm(len(whole), generator=draw).tolist():
            yield from whole[place]
        for rows in rest:
            yield from rows


class LengthGrouped(Trainer):
    """Mixed into a TRL trainer: little padding, and the same batches after a resume."""

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(row_lengths(rows), batch, self.args.seed)


class KeepsAnswers(Trainer):
    """Mixed into a TRL trainer: of a text beyond `max_length` the beginning of the prompt is left out.

    TRL cuts the answer instead, and drops the row where the prompt alone is too long.
    """

    def _prepare_dataset(self, dataset, processing_class, args, *more):
        longest = args.max_length
        if longest is None or getattr(args, "packing", False):
            return super()._prepare_dataset(dataset, processing_class, args, *more)  # type: ignore[misc]
        args.max_length = None
        try:
            rows = super()._prepare_dataset(dataset, processing_class, args, *more)  # type: ignore[misc]
        finally:
            args.max_length = longest
        if max(row_lengths(rows), default=0) <= longest:
            return rows
        return rows.map(fitting, fn_kwargs={"longest": longest}, desc="fitting long prompts")


def fitting(row: Mapping[str, Any], longest: int) -> dict[str, list[int]]:
    """What changes of a tokenised row so that it has at most `longest` tokens: the beginning of the prompt goes first.

    One token of the prompt stays; where an answer alone is longer than the rest, its end goes too.

    Args:
        row: `prompt_ids` and `chosen_ids`, `rejected_ids` or `completion_ids`; or `input_ids` and `labels`.
    """
    if "labels" in row:
        asked = next((place for place, label in enumerate(row["labels"]) if label != IGNORED), 0)
        first = max(0, min(asked - 1, len(row["labels"]) - longest))
        return {name: row[name][first : first + longest] for name in ("input_ids", "labels")}
    answers = {name: row[name][: longest - 1] for name in ANSWERS if name in row}
    room = longest - max(map(len, answers.values()))
    return {"prompt_ids": row["prompt_ids"][-room:], **answers}


class AsksReference(Trainer):
    """Mixed into a TRL trainer that asks its reference about every row before it trains: says how far that is.

    Args:
        tracker: told of every batch of the reference's pass, of which there are `reference_batches`.
    """

    def __init__(self, *args, tracker: Tracker, reference_batches: int, **kwargs) -> None:
        self.tracker, self.reference_batches, self.referenced = tracker, reference_batches, 0
        super().__init__(*args, **kwargs)

    def compute_ref_log_probs(self, model, inputs):
        self.tracker.progress("reference", self.referenced, self.reference_batches)
        self.referenced += 1
        return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]


def row_lengths(rows: Any) -> list[int]:
    """Tokens of each row of a tokenised dataset; for a pair, of its longer side."""
    if "chosen_ids" in rows.column_names:
        prompts = map(len, rows["prompt_ids"]) if "prompt_ids" in rows.column_names else [0] * len(rows)
        sides = zip(prompts, rows["chosen_ids"], rows["rejected_ids"], strict=True)
        return [prompt + max(len(chosen), len(rejected)) for prompt, chosen, rejected in sides]
    if "completion_ids" in rows.column_names:
        both = zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
        return [len(prompt) + len(said) for prompt, said in both]
    return [len(ids) for ids in rows["input_ids"]]


class Reporter(TrainerCallback):
    """Tells the tracker what the trainer logs, and stops the trainer at a checkpoint when the process is asked to.

    Args:
        is_exact: whether a run resumed at a step repeats the straight one. A checkpoint that is due where it would not
            is written at the next step where it does.
    """

    def __init__(self, tracker: Tracker, is_exact: Callable[[int], bool] = lambda step: True) -> None:
        self.tracker, self.is_exact = tracker, is_exact
        self.shown: dict[str, float] = {}
        self.evaluated = 0
        self.due = False
        self.exact_at = self.saved_at = 0  # the last step a checkpoint could be written at, and the last one's

    def alarmed(self, step: int) -> bool:
        """Whether an alarm wants the training to have ended by this step."""
        return self.tracker.stops_at is not None and step >= self.tracker.stops_at

    def on_train_begin(self, args, state, control, **kwargs):
        self.exact_at = self.saved_at = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        self.tracker.progress("training", state.global_step, state.max_steps, self.shown)
        stop = stop_requested()
        self.due |= control.should_save or stop
        if self.is_exact(state.global_step):
            self.exact_at = state.global_step
            control.should_save = self.due
            if self.due:
                self.due, self.saved_at = False, state.global_step
        else:
            control.should_save = False
        if stop and self.saved_at == self.exact_at:  # what came since can only be done again
            control.should_training_stop = True

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self.evaluated += 1
        self.tracker.progress("held-out", self.evaluated, len(eval_dataloader))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if stop_requested() and state.global_step % args.logging_steps:
            return  # logged for the stop alone; the resumed run reports these steps when they are due
        values = named(logs or {})
        if values:
            self.tracker.metrics(values, state.global_step)
        if self.alarmed(state.global_step):
            control.should_training_stop, control.should_save = True, False
        self.shown |= {name: value for name, value in values.items() if not name.startswith("eval_")}


def named(logs: Mapping[str, Any]) -> dict[str, float]:
    """A trainer's log under the project's names, without its timings."""
    values = {}
    for name, value in logs.items():
        if not isinstance(value, int | float) or any(part in name for part in SILENT):
            continue
        prefix, bare = ("eval_", name.removeprefix("eval_")) if name.startswith("eval_") else ("", name)
        values[prefix + NAMES.get(bare, bare)] = float(value)
    return values


def newest_whole_checkpoint(folder: Path, files: Sequence[str] = CHECKPOINT_FILES) -> str | None:
    """The newest checkpoint that can be resumed; broken ones are removed, so that none is taken for whole."""
    while folder.is_dir() and (newest := get_last_checkpoint(str(folder))):
        if is_whole(Path(newest), files):
            return newest
        shutil.rmtree(newest)
    return None


def is_whole(checkpoint: Path, files: Sequence[str] = CHECKPOINT_FILES) -> bool:
    """Whether a checkpoint has everything a resumed run needs, readable."""
    from safetensors import safe_open

    if any(not (checkpoint / name).is_file() for name in files):
        return False
    try:
        for name in files:
            if name.endswith(".json"):
                json.loads((checkpoint / name).read_text(encoding="utf-8"))
            elif name.endswith(".safetensors"):
                with safe_open(checkpoint / name, "pt") as weights:
                    weights.keys()
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        if not zipfile.is_zipfile(checkpoint / "rng_state.pth"):
            return False
    except Exception:  # a torn file makes its reader raise anything
        return False
    return True


def run_trainer(trainer: Trainer, tracker: Tracker) -> None:
    """Train to the end, from the newest whole checkpoint if there is one.

    A trainer may say by `is_exact(step)` where its checkpoints are exact, and by `checkpoint_files` what they hold.

    Raises:
        Interrupted: the process was asked to stop; a checkpoint was written first.
        StepFailed: the loss is not a number any more.
    """
    reporter = Reporter(tracker, getattr(trainer, "is_exact", lambda step: True))
    trainer.add_callback(reporter)
    files = getattr(trainer, "checkpoint_files", CHECKPOINT_FILES)
    checkpoint = newest_whole_checkpoint(Path(trainer.args.output_dir), files)
    leave_finished(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    if reporter.alarmed(trainer.state.global_step):
        keep_best(trainer, int(tracker.stops_at or 0), files)
    state = trainer.state
    if stop_requested() and state.global_step < state.max_steps:
        raise Interrupted(
            "stopped on request",
            have=f"a checkpoint at step {reporter.saved_at} of {state.max_steps}",
            then="run again: it goes on from there",
        )
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    if losses and not math.isfinite(losses[-1]):
        raise StepFailed(
            "the loss is not a number",
            have=f"{losses[-1]} at step {state.global_step}",
            then="lower trainer.learning_rate, or set model.dtype=float32",
        )


def leave_finished(trainer: Trainer) -> None:
    """Let a trainer that is resumed at its last step take none.

    By itself it takes one more where that step is not the last of an epoch: it counts steps after it has taken them.
    """
    begin = trainer._init_training_state

    def init_training_state(max_steps, steps_per_epoch, epochs, *given):
        trained = begin(max_steps, steps_per_epoch, epochs, *given)
        return (epochs, 0) if trainer.state.global_step >= max_steps else trained

    trainer._init_training_state = init_training_state  # type: ignore[method-assign]


def keep_best(trainer: Trainer, stopped: int, files: Sequence[str]) -> None:
    """Go back to the best checkpoint from before an alarm, with all that the trainer knew then.

    What a report says is true of the weights before its last update, so a checkpoint counts when a report without an
    alarm came after it; that report's reward or accuracy says how good it is. Of two that are equal the newer stays.

    Raises:
        StepFailed: there is none.
    """
    history = [entry for entry in trainer.state.log_history if entry["step"] < stopped]
    found = []
    for folder in Path(trainer.args.output_dir).glob("checkpoint-*"):
        step = int(folder.name.rpartition("-")[2])
        later = [entry for entry in history if entry["step"] > step]
        if later and is_whole(folder, files):
            found.append((next((later[0][name] for name in BEST if name in later[0]), 0.0), step, folder))
    if not found:
        raise StepFailed(
            f"an alarm stopped the training at step {stopped}, before there was a checkpoint to keep",
            where=str(trainer.args.output_dir),
            then="lower trainer.save_steps, or mend what the alarm is about (the run's tags `alarm.*` say it)",
        )
    _, _, folder = max(found)
    trainer._load_from_checkpoint(str(folder))
    trainer.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))


def held_out_metrics(trainer: Trainer, tracker: Tracker) -> dict[str, float]:
    """Evaluate on the held-out rows, report it, and return it under the project's names."""
    tracker.progress("held-out", 0, len(trainer.get_eval_dataloader()))
    return named(trainer.evaluate())
