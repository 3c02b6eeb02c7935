"""Pictures: what a step's curves did, and what a run came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.artifact import CHART, COMPLETIONS, Facts, open_artifact
from steps.datasets import read_table
from steps.tracking import curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = Mapping[str, list[tuple[int, float]]]

BLUE, ORANGE, GREY = "#2458a6", "#d1702c", "#8a8f98"
PANELS: tuple[tuple[str, tuple[tuple[str, str, str], ...], float | None], ...] = (
    ("loss", (("loss", "train", BLUE),), None),
    ("rewards", (("rewards/chosen", "chosen", BLUE), ("rewards/rejected", "rejected", ORANGE)), 0.0),
    ("margin (chosen − rejected)", (("rewards/margins", "train", BLUE),), 0.0),
    ("share of pairs ordered right", (("rewards/accuracies", "train", BLUE),), 0.5),
    ("reward model's score of answers", (("reward", "mean", BLUE),), None),
    ("KL to the start, nats an answer", (("kl", "mean", BLUE),), 0.0),
    ("critic: explained variance", (("explained_variance", "of returns", BLUE),), 0.0),
    ("tokens in an answer", (("completion_length", "mean", BLUE),), None),
)
ACROSS = 4  # panels in a row


def draw(folder: Path, step: str, inputs: Mapping[str, Path], facts: Facts) -> Path | None:
    """Draw what a step did into `chart.png`: its curves or, once the policy is judged, the whole run.

    Args:
        folder: the step's working directory.
        inputs: what the step reads, by argument name.

    Returns:
        the picture, or None when there is nothing to draw.
    """
    if step == "evaluate":
        return topics_picture(folder, facts) if "topics" in facts else run_picture({**inputs, step: folder}, facts)
    return step_chart(folder, step, facts)


def step_chart(folder: Path, title: str, facts: Facts | None = None) -> Path | None:
    """The curves in a step's journal, and a reward model's reliability; None when there are no curves."""
    found = curves(folder)
    panels = [panel for panel in PANELS if any({name, f"eval_{name}"} & found.keys() for name, _, _ in panel[1])]
    if not panels:
        return None
    bins = (facts or {}).get("reliability")
    count = len(panels) + bool(bins)
    across, down = min(ACROSS, count), -(-count // ACROSS)
    figure, axes = new_figure(down, across, (4.2 * across, 3.2 * down), squeeze=False)
    for ax, (label, series, level) in zip(axes.flat, panels, strict=False):
        _panel(ax, found, label, series, level)
    if bins:
        _reliability(axes.flat[len(panels)], bins)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return save_figure(figure, folder / CHART)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "figure.constrained_layout.use": True,
        }
    )
    return plt


def new_figure(down: int, across: int, size: tuple[float, float], **options: Any):
    """A figure in the project's style, and its axes."""
    return _pyplot().subplots(down, across, figsize=size, **options)


def save_figure(figure, path: Path) -> Path:
    """Write a figure as PNG and let go of it."""
    # No date and no version inside: the same curves give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    _pyplot().close(figure)
    return path


def _panel(ax: Axes, found: Curves, label: str, series, level: float | None) -> None:
    for name, legend, colour in series:
        if points := found.get(name):
            dot = "o" if len(points) == 1 else None  # a line of one point is none
            ax.plot(*zip(*points, strict=True), color=colour, label=legend, linewidth=1.6, marker=dot)
        if held_out := found.get(f"eval_{name}"):
            ax.plot(
                *zip(*held_out, strict=True),
                "D",
                color=colour,
                markeredgecolor="black",
                label="held out" if legend == "train" else f"{legend}, held out",
            )
    if level is not None:
        ax.axhline(level, color=GREY, linewidth=0.8, linestyle="--")
    ax.set_title(label, fontsize=9, loc="left")
    ax.set_xlabel("step")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8)


def _reliability(ax: Axes, bins: Sequence[Mapping[str, float]]) -> None:
    """How often the reward model is right against how sure it is; on the line it is calibrated."""
    sure = [part["predicted"] for part in bins]
    right = [part["accuracy"] for part in bins]
    bounds = [(part["accuracy"] - part["accuracy_low"], part["accuracy_high"] - part["accuracy"]) for part in bins]
    spread = [[max(0.0, half) for half in side] for side in zip(*bounds, strict=True)]  # rounding may leave −1e-17
    ax.plot((0.5, 1), (0.5, 1), color=GREY, linewidth=0.8, linestyle="--")
    ax.errorbar(sure, right, spread, color=BLUE, marker="o", linewidth=1.2, capsize=2)
    ax.set_title("held-out pairs: share right against how sure", fontsize=9, loc="left")
    ax.set_xlabel("σ(difference of rewards)")


def run_picture(folders: Mapping[str, Path], measured: Facts) -> Path:
    """One picture of a run: what the steps learnt, and whether people would prefer the result.

    Args:
        folders: directories of sft, unless the policy is that, reward, policy and evaluate; the picture goes into the
            last.
        measured: what the evaluation found.
    """
    import numpy as np

    figure, axes = new_figure(1, 4, (15, 3.4), width_ratios=(1, 1, 1, 1.25))
    if "sft" in folders:
        _panel(axes[0], curves(folders["sft"]), "SFT: loss on demonstrations", PANELS[0][1], None)
    else:
        axes[0].set_axis_off()
    reward = open_artifact(folders["reward"])
    accuracy = f"{reward.facts['accuracy']:.0%} of held-out pairs right" if reward else ""
    _panel(axes[1], curves(folders["reward"]), "", PANELS[3][1], 0.5)
    axes[1].set_title(f"reward model: {accuracy}", fontsize=9, loc="left")
    tuned = curves(folders["policy"])
    if "reward" in tuned:
        _panel(axes[2], tuned, f"policy: {PANELS[4][0]}", PANELS[4][1], None)
    elif tuned:
        _panel(axes[2], tuned, "policy: implicit rewards", PANELS[1][1], 0.0)
    else:
        axes[2].set_axis_off()
    table = read_table(folders["evaluate"] / COMPLETIONS)
    by, scale = ("gold", "gold judge's score") if "start_gold" in table else ("reward", "reward model's score")
    before, after = table[f"start_{by}"], table[f"policy_{by}"]
    bins = np.linspace(min(before.min(), after.min()), max(before.max(), after.max()), 25)
    axes[3].hist(before, bins, color=GREY, alpha=0.75, label="start")
    axes[3].hist(after, bins, color=BLUE, alpha=0.65, label="tuned policy")
    axes[3].set_title(
        f"scores of {measured['prompts']} answers: win rate {measured['win_rate']:.2f} "
        f"[{measured['win_rate_low']:.2f}, {measured['win_rate_high']:.2f}]",
        fontsize=9,
        loc="left",
    )
    axes[3].set_xlabel(scale)
    axes[3].legend(frameon=False, fontsize=8)
    return save_figure(figure, folders["evaluate"] / CHART)


def topics_picture(folder: Path, measured: Facts) -> Path:
    """Each topic's score before and after, with intervals; the topics the next round aims at in another colour."""
    scores, aims = measured["topics"], measured["weakest"]
    figure, ax = new_figure(1, 1, (8, 1.4 + 0.42 * len(scores)))
    for place, score in enumerate(scores):
        after = ORANGE if score["topic"] in aims else BLUE
        for name, shift, colour in (("before", -0.14, GREY), ("after", 0.14, after)):
            bounds = (score[f"{name}_low"], score[f"{name}_high"])
            ax.plot(bounds, (place + shift,) * 2, color=colour, linewidth=1.2, alpha=0.6)
            ax.plot(score[name], place + shift, "o", color=colour)
    handles = [ax.plot([], [], "o-", color=colour)[0] for colour in (GREY, BLUE, ORANGE)]
    names = ("before", "after", "after, aim of the next round")
    figure.legend(handles, names, frameon=False, fontsize=8, loc="outside upper right", ncols=3)
    ax.set_yticks(range(len(scores)), [score["topic"] for score in scores])
    ax.invert_yaxis()
    ax.set_xlim(-0.02, 1.02)
    ax.axvline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    ax.set_xlabel(f"score by the {measured['judge']} judge, with {measured['confidence']:.0%} intervals over probes")
    return save_figure(figure, folder / CHART)
