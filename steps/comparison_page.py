"""A comparison as pictures, and as one page that needs no server."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from steps.charts import new_figure, save_figure
from steps.comparison import Group

MARKERS = ("o", "s", "^", "D", "v", "P")
COLOURS = ("#2458a6", "#d1702c", "#3c8a54", "#8a5fb0", "#8a8f98", "#a33b12")

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #1c1e21 }
img { max-width: 100% } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: right; font-weight: 600 } td { text-align: right } td, th { padding: .3rem .7rem .3rem 0 }
td, th { border-bottom: 1px solid #e3e5e8; white-space: nowrap } .name { text-align: left }
.frontier { font-weight: 600 } small, .fine { color: #5d636b }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<ul>{% for sentence in said %}<li>{{ sentence }}</li>{% endfor %}</ul>
<img alt="Gold score, proxy score and win rate against KL to the start" src="data:image/png;base64,{{ picture }}">
<h2>Settings</h2>
<table>
<tr><th class="name">method</th><th class="name">setting</th><th>seeds</th><th>failed</th><th>KL, nats</th>
<th>gold</th><th>reward</th><th>win rate</th><th>95 % interval</th><th>p (Holm)</th><th>length ×</th>
<th>dominates</th><th>dominated by</th>
<th>pairs</th><th>chosen, nats</th><th>rejected</th><th>CPU s</th><th>MiB</th></tr>
{% for group in groups %}
<tr class="{{ 'frontier' if not group.dominated }}">
<td class="name">{{ group.method }}</td><td class="name">{{ group.setting }}</td>
<td>{{ group.seeds }}</td><td>{{ group.failures or "" }}</td>
<td>{{ number(group.kl, ".1f") }}</td>
<td>{{ number(group.gold, ".2f") }} <small>± {{ number(group.gold_spread, ".2f") }}</small></td>
<td>{{ number(group.reward, ".2f") }}</td><td>{{ number(group.win_rate, ".3f") }}</td>
<td>{% if group.win_rate_low is not none %}[{{ number(group.win_rate_low, ".3f") }},
{{ number(group.win_rate_high, ".3f") }}]
{% endif %}</td><td>{{ "" if group.p_value is none else "%.2g" | format(group.p_value) }}</td>
<td>{{ number(group.length_ratio, ".2f") }}</td><td>{{ group.dominates }}</td><td>{{ group.dominated }}</td>
<td>{{ number(group.accuracy, ".2f") }}</td><td>{{ number(group.chosen, "+.1f") }}</td>
<td>{{ number(group.rejected, "+.1f") }}</td>
<td>{{ number(group.tuning, ".0f") }}</td><td>{{ number(group.peak_mib, ".0f") }}</td></tr>
{% endfor %}
</table>
<p class="fine">Bold: nothing else has more gold for less KL. Gold: mean rating of a judge fitted on people's ratings no
training step saw; ± is the deviation over seeds. Intervals and p-values are of all seeds' verdicts together, clustered
by prompt. KL of best of n is the bound ln n − (n − 1)/n; of the others it is estimated on their own answers. Pairs:
share of held-out pairs the policy orders as people do. Chosen, rejected: how much likelier, in nats, held-out answers
became; DPO may push both below 0 while its margin grows. CPU seconds and memory (libraries included) are those of the
policy step.</p>
{% if errors %}<h2>Runs without a result</h2>
<ul>{% for name, error in errors %}<li>{{ name }}: {{ error }}</li>{% endfor %}</ul>{% endif %}
</body>
</html>
"""


def number(value: float, spelled: str) -> str:
    """A number as a cell; an empty one for what a method does not have."""
    return "" if math.isnan(value) else format(value, spelled)


def draw_frontier(groups: Sequence[Group], path: Path) -> Path:
    """Gold against KL, proxy against gold, and win rate against KL (Gao et al. 2022, arXiv:2210.10760, fig. 1)."""
    figure, axes = new_figure(1, 3, (15, 4.4))
    looks = itertools.product(MARKERS, COLOURS)  # 36 methods before two look alike
    for method, (marker, colour) in zip(dict.fromkeys(group.method for group in groups), looks, strict=False):
        mine = sorted((group for group in groups if group.method == method), key=lambda group: group.kl)
        style = {"color": colour, "marker": marker, "label": method.replace("_", " "), "linewidth": 1.4}
        kl, gold = [group.kl for group in mine], [group.gold for group in mine]
        axes[0].errorbar(kl, gold, [group.gold_spread for group in mine], capsize=2, **style)
        axes[1].plot([group.reward for group in mine], gold, **style)
        axes[2].plot(kl, [group.win_rate for group in mine], **style)
        bounds = [(group.kl, group.win_rate_low, group.win_rate_high) for group in mine]
        for place, low, high in bounds:
            if low is not None and high is not None:
                axes[2].plot((place, place), (low, high), color=colour, linewidth=1)
        for group in mine if len(mine) > 1 else ():  # the only one of a method needs no telling apart
            axes[0].annotate(
                group.setting, (group.kl, group.gold), fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
    axes[2].axhline(0.5, color="#8a8f98", linewidth=0.8, linestyle="--")
    labels = (
        ("the frontier: gold score against distance", "KL to the start, nats an answer", "gold score"),
        ("over-optimisation: gold against the reward model", "reward model's score", "gold score"),
        ("win rate against the start", "KL to the start, nats an answer", "win rate"),
    )
    for ax, (title, x, y) in zip(axes, labels, strict=True):
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_xlabel(x)
        ax.set_ylabel(y)
    axes[2].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return save_figure(figure, path)


def comparison_page(
    title: str, groups: Sequence[Group], said: Sequence[str], errors: Sequence[tuple[str, str]], picture: Path
) -> str:
    """The comparison as HTML that holds its picture; all text in it is escaped."""
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title=title,
            groups=sorted(groups, key=lambda group: (group.method, group.kl)),
            said=said,
            errors=errors,
            picture=base64.b64encode(picture.read_bytes()).decode("ascii"),
            number=number,
        )
    )
