"""What trained steps share: batches, names, settings, and which checkpoints count."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, SFTConfig

from steps import training
from steps.errors import StepFailed
from steps.training import (
    DEFAULTS,
    LengthGroupedSampler,
    Reporter,
    arguments,
    even_batches,
    fitting,
    is_whole,
    named,
    newest_whole_checkpoint,
    row_lengths,
    run_trainer,
)

# -- batches -----------------------------------------------------------------------------------------------------


def order_of(lengths: list[int], batch: int, seed: int = 0, epoch: int = 0) -> list[int]:
    sampler = LengthGroupedSampler(lengths, batch, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def padding(order: list[int], lengths: list[int], batch: int) -> int:
    """Padding tokens of the batches an order is cut into."""
    batches = [[lengths[row] for row in order[i : i + batch]] for i in range(0, len(order), batch)]
    return sum(max(rows) * len(rows) - sum(rows) for rows in batches)


@given(st.lists(st.integers(1, 200), max_size=300), st.integers(1, 17), st.integers(0, 9), st.integers(0, 3))
def test_every_row_comes_once_an_epoch(lengths: list[int], batch: int, seed: int, epoch: int) -> None:
    assert sorted(order_of(lengths, batch, seed, epoch)) == list(range(len(lengths)))
    assert len(LengthGroupedSampler(lengths, batch, seed)) == len(lengths)


def test_the_order_is_that_of_seed_and_epoch_alone() -> None:
    lengths = random.Random(0).choices(range(5, 100), k=203)
    used = LengthGroupedSampler(lengths, 8, 3)
    list(used)
    torch.rand(100)
    used.set_epoch(2)
    assert list(used) == order_of(lengths, 8, 3, 2)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    lengths = random.Random(0).choices(range(5, 100), k=203)
    orders = {tuple(order_of(lengths, 8, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_batches_hold_less_padding_than_random_ones() -> None:
    """Sorting pools of 16 batches leaves about a tenth of it on uniform lengths; a quarter is asked for."""
    lengths = random.Random(0).choices(range(5, 200), k=1024)
    shuffled = random.Random(1).sample(range(1024), 1024)
    assert padding(order_of(lengths, 8), lengths, 8) < padding(shuffled, lengths, 8) / 4


def test_batches_do_not_come_in_order_of_length() -> None:
    lengths = list(range(512))
    firsts = [lengths[row] for row in order_of(lengths, 8)[::8]]
    assert firsts != sorted(firsts)
    assert sum(firsts[:32]) / 32 == pytest.approx(sum(firsts) / len(firsts), rel=0.35)


@pytest.mark.parametrize("seed", range(5))
def test_an_incomplete_batch_comes_last(seed: int) -> None:
    """Five lengths have four borders, each with at most 3 rows 10 short in its batch; shifted batches have more."""
    lengths = [10 * (row % 5) for row in range(43)]
    assert padding(order_of(lengths, 4, seed)[:40], lengths, 4) <= 4 * 3 * 10


@pytest.mark.parametrize(
    ("rows", "at_most", "expected"),
    [(400, 32, (384, 32)), (32, 32, (32, 32)), (31, 32, (31, 31)), (33, 32, (32, 32)), (1, 32, (1, 1)), (7, 3, (6, 3))],
)
def test_batches_are_even(rows: int, at_most: int, expected: tuple[int, int]) -> None:
    assert even_batches(rows, at_most) == expected


@given(st.integers(1, 2000), st.integers(1, 64))
def test_even_batches_lose_less_than_one_batch(rows: int, at_most: int) -> None:
    count, batch = even_batches(rows, at_most)
    assert count % batch == 0
    assert 0 < batch <= at_most
    assert rows - batch < count <= rows


def test_the_length_of_a_row_is_its_tokens_and_of_a_pair_its_longer_side() -> None:
    assert row_lengths(Dataset.from_dict({"input_ids": [[1, 2], [1]]})) == [2, 1]
    pairs = {"chosen_ids": [[1, 2], [1]], "rejected_ids": [[1], [1, 2, 3]]}
    assert row_lengths(Dataset.from_dict(pairs)) == [2, 3]
    assert row_lengths(Dataset.from_dict({**pairs, "prompt_ids": [[1, 2, 3, 4], []]})) == [6, 3]


# -- settings ----------------------------------------------------------------------------------------------------


def test_ours_stand_over_trls_and_the_recipes_over_ours(tmp_path: Path) -> None:
    made = arguments(SFTConfig, {"logging_steps": 2, "learning_rate": 5e-7}, seed=7, out=tmp_path)
    assert made.logging_steps == 2
    assert made.learning_rate == 5e-7
    assert made.save_steps == DEFAULTS["save_steps"]
    assert made.bf16 is False
    assert made.gradient_checkpointing is False


def test_what_the_pipeline_decides_stands_over_everything(tmp_path: Path) -> None:
    made = arguments(DPOConfig, {"beta": 0.3, "seed": 1}, seed=7, out=tmp_path, per_device_eval_batch_size=5)
    assert made.seed == 7
    assert made.beta == 0.3
    assert made.output_dir == str(tmp_path / "checkpoints")
    assert made.report_to in ("none", [], ["none"])
    assert made.per_device_eval_batch_size == 5


def test_a_value_that_trl_refuses_is_reported_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as caught:
        arguments(SFTConfig, {"lr_scheduler_type": "sideways"}, seed=0, out=tmp_path)
    text = str(caught.value)
    assert "TRL refuses the trainer's settings" in text
    assert "SFTConfig" in text
    assert "sideways" in text


# -- reporting ---------------------------------------------------------------------------------------------------


def test_a_log_is_named_as_the_project_names_it() -> None:
    logs = {"loss": 1, "accuracy": 0.5, "margin": 2.0, "eval_accuracy": 0.25, "eval_rewards/chosen": -1.5}
    assert named(logs) == {
        "loss": 1.0,
        "rewards/accuracies": 0.5,
        "rewards/margins": 2.0,
        "eval_rewards/accuracies": 0.25,
        "eval_rewards/chosen": -1.5,
    }


def test_timings_and_text_are_left_out() -> None:
    logs = {"train_runtime": 3.0, "eval_samples_per_second": 1.0, "total_flos": 1e9, "epoch": 1.0, "note": "text"}
    assert named(logs) == {}


class Heard:
    """A tracker that remembers."""

    stops_at: int | None = None

    def __init__(self) -> None:
        self.said: list[tuple] = []

    def metrics(self, values: dict, step: int) -> None:
        self.said.append(("metrics", values, step))

    def progress(self, phase: str, done: int, total: int, values: dict | None = None) -> None:
        self.said.append(("progress", phase, done, total, dict(values or {})))


def test_the_reporter_passes_on_metrics_and_shows_the_last_ones() -> None:
    heard = Heard()
    reporter = Reporter(heard)
    state, control = SimpleNamespace(global_step=4, max_steps=9), SimpleNamespace(should_save=False)
    reporter.on_log(None, state, control, {"loss": 2.0, "eval_loss": 3.0, "epoch": 0.1})
    reporter.on_log(None, state, control, {"train_runtime": 1.0})
    reporter.on_step_end(None, state, control)
    assert heard.said == [
        ("metrics", {"loss": 2.0, "eval_loss": 3.0}, 4),
        ("progress", "training", 4, 9, {"loss": 2.0}),
    ]


def test_the_reporter_saves_and_stops_when_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    state = SimpleNamespace(global_step=4, max_steps=9)
    Reporter(Heard()).on_step_end(None, state, control)
    assert not control.should_save
    monkeypatch.setattr(training, "stop_requested", lambda: True)
    Reporter(Heard()).on_step_end(None, state, control)
    assert control.should_save
    assert control.should_training_stop


def test_what_is_logged_for_a_stop_alone_is_left_to_the_resumed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "stop_requested", lambda: True)
    heard, control = Heard(), SimpleNamespace(should_save=False, should_training_stop=False)
    for step in (6, 8):
        Reporter(heard).on_log(
            SimpleNamespace(logging_steps=4), SimpleNamespace(global_step=step), control, {"loss": 1.0}
        )
    assert heard.said == [("metrics", {"loss": 1.0}, 8)]


def test_the_reporter_ends_the_training_at_an_alarm_and_saves_nothing_then() -> None:
    heard = Heard()
    heard.stops_at = 6
    for step, ended in ((4, False), (6, True)):  # a resumed run has yet to come to the step of the alarm
        control = SimpleNamespace(should_save=True, should_training_stop=False)
        Reporter(heard).on_log(None, SimpleNamespace(global_step=step), control, {"loss": 1.0})
        assert (control.should_training_stop, control.should_save) == (ended, not ended)


def steps_of(reporter: Reporter, first: int, last: int, due: tuple[int, ...] = ()) -> list[tuple[int, bool, bool]]:
    """(step, saved, stopped) of the steps a reporter does something at."""
    reporter.on_train_begin(None, SimpleNamespace(global_step=first), None)
    done = []
    for step in range(first + 1, last + 1):
        control = SimpleNamespace(should_save=step in due, should_training_stop=False)
        reporter.on_step_end(None, SimpleNamespace(global_step=step, max_steps=99), control)
        if control.should_save or control.should_training_stop:
            done.append((step, control.should_save, control.should_training_stop))
    return done


def test_a_checkpoint_waits_for_a_step_it_is_exact_at() -> None:
    reporter = Reporter(Heard(), lambda step: step % 4 == 0)
    assert steps_of(reporter, 0, 13, due=(3, 8, 9, 10)) == [(4, True, False), (8, True, False), (12, True, False)]


def test_a_stop_waits_for_a_checkpoint_unless_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "stop_requested", lambda: True)
    every = lambda step: step % 4 == 0  # noqa: E731
    assert steps_of(Reporter(Heard(), every), 4, 5) == [(5, False, True)]  # resumed at 4: the checkpoint is there
    monkeypatch.setattr(training, "stop_requested", lambda: False)
    reporter = Reporter(Heard(), every)
    assert steps_of(reporter, 0, 6) == []
    monkeypatch.setattr(training, "stop_requested", lambda: True)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    for step in (7, 8):  # the last exact step, 4, was not saved
        reporter.on_step_end(None, SimpleNamespace(global_step=step, max_steps=99), control)
        assert (control.should_save, control.should_training_stop) == ((step == 8), (step == 8))


# -- checkpoints -------------------------------------------------------------------------------------------------


# What transformers' Trainer reads, without asking whether it is whole, when it resumes an adapter.
FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors")


def checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint with every file a resumed trainer reads, small."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"w": torch.arange(1000.0)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.arange(1000.0)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_whole_checkpoint_is_whole(tmp_path: Path) -> None:
    assert is_whole(checkpoint(tmp_path, 3))


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_file_missing_is_not_whole(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 3)
    (path / name).unlink()
    assert not is_whole(path)


DAMAGES = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "nought": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another": lambda path: path.write_bytes(b"something else, and long enough for a header of some kind"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_damaged_file_is_not_whole(name: str, damage: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 3)
    DAMAGES[damage](path / name)
    assert not is_whole(path)


def test_the_newest_checkpoint_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    assert newest_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_broken_checkpoints_are_removed_until_a_whole_one_is_newest(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-9" / "optimizer.pt").unlink()
    cut(tmp_path / "checkpoint-12" / "adapter_model.safetensors")
    assert newest_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None
    assert newest_whole_checkpoint(tmp_path) is None
    (checkpoint(tmp_path, 3) / "trainer_state.json").unlink()
    assert newest_whole_checkpoint(tmp_path) is None


# -- resuming ----------------------------------------------------------------------------------------------------


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x - 1).square().mean()}


@pytest.mark.parametrize("steps", [5, 6], ids=["within an epoch", "at its end"])
def test_a_trainer_that_had_finished_takes_no_further_step(steps: int, tmp_path: Path) -> None:
    def trained() -> tuple[int, float]:
        given = TrainingArguments(str(tmp_path), max_steps=steps, save_steps=steps, per_device_train_batch_size=1)
        given = replace(given, lr_scheduler_type="constant", learning_rate=0.1, report_to="none", disable_tqdm=True)
        rows = Dataset.from_dict({"x": [2.0, 3.0, 4.0]}).with_format("torch")
        trainer = Trainer(Line(), given, train_dataset=rows)
        trainer.checkpoint_files = ("trainer_state.json", "model.safetensors")
        run_trainer(trainer, Heard())
        return trainer.state.global_step, trainer.model.weight.item()

    straight = trained()
    assert straight[0] == steps
    assert trained() == straight


# -- long prompts ------------------------------------------------------------------------------------------------


def test_a_text_that_is_too_long_loses_the_beginning_of_its_prompt_first() -> None:
    pair = {"prompt_ids": [1, 2, 3, 4, 5], "chosen_ids": [6, 7], "rejected_ids": [8, 9, 10]}
    assert fitting(pair, 6) == {**pair, "prompt_ids": [3, 4, 5]}
    assert fitting(pair, 8) == pair
    labelled = {"prompt_ids": [1, 2, 3], "completion_ids": [4], "KL_completion_ids": [5, 6]}
    assert fitting(labelled, 4) == {**labelled, "prompt_ids": [2, 3]}
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]}
    assert fitting(row, 3) == {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}


def test_an_answer_that_is_too_long_by_itself_keeps_its_beginning_behind_one_token() -> None:
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5, 6], "rejected_ids": [7]}
    assert fitting(pair, 3) == {"prompt_ids": [2], "chosen_ids": [3, 4], "rejected_ids": [7]}
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5]}
    assert fitting(row, 3) == {"input_ids": [2, 3, 4], "labels": [-100, 3, 4]}
    whole = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}  # every token is learnt: as TRL cuts it
    assert fitting(whole, 2) == {"input_ids": [1, 2], "labels": [1, 2]}
