"""A lineage for people: a tree on the terminal, and a drawing that needs no server."""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from steps import report, tracking
from steps.data_lineage import WORK_TREE
from steps.lineage import Lineage, Node, of_run, total
from steps.report import plain
from steps.tracking import Forwarder

JSON, DRAWING = "lineage.json", "lineage.svg"
MANY_FILES = 6  # raw files from which the drawing shows one box for all
NOT_KNOWN = "not known"


def leave(folder: Path, root: Path, forwarder: Forwarder, model: str) -> None:
    """Leave `lineage.json` and `lineage.svg` in the folder of a run that is ending, and among its artifacts.

    A lineage that cannot be written costs the run nothing but a tag that says so.
    """
    try:
        lineage = of_run(folder, root, forwarder, model)
        text = json.dumps(lineage.to_json(), indent=1, ensure_ascii=False) + "\n"
        for name, content in ((JSON, text), (DRAWING, svg(lineage))):
            (folder / name).write_text(content, encoding="utf-8")
            tracking.append(folder, "artifact", path=name)
    except Exception as error:  # the model is registered; how it is described must not undo that
        tracking.append(folder, "tags", values={"lineage": f"not written: {type(error).__name__}: {error}"})


# -- the tree ----------------------------------------------------------------------------------------------------


def print_lineage(out: Console, lineage: Lineage) -> None:
    """The graph as a tree, the run and the verdict beside it, then costs, and what is not known."""
    top = lineage.nodes[0]
    tree = Tree(_line(*_head(top, lineage)), guide_style="dim")
    tree.add(_run_branch(lineage))
    tree.add(_verdict_branch(lineage))
    shown: set[str] = set()
    for role, node in lineage.made_from(top.id):
        _add(tree, role, node, lineage, shown)
    out.print(tree, highlight=False)
    out.print()
    out.print(_costs(lineage))
    out.print(_energy(lineage), style="dim", highlight=False)
    for title, style, sentences in (
        ("not known any more", "yellow", lineage.unknown),
        ("does not fit together", "bold red", lineage.contradictions),
    ):
        if sentences:
            out.print(f"\n[{style}]{title}[/]", highlight=False)
            for sentence in sentences:
                out.print(f"  {plain(sentence)}", highlight=False)


def _add(tree: Tree, role: str, node: Node, lineage: Lineage, shown: set[str]) -> None:
    lines = _lines(node)
    name = _line(lines[0], f"as {role}" if role not in (node.title.rpartition("/")[2], "raw", "split") else "")
    if node.id in shown:
        tree.add(f"{name} [dim](above)[/]")
        return
    shown.add(node.id)
    branch = tree.add("\n".join([name, *(f"[dim]{plain(line)}[/]" for line in lines[1:])]))
    for further, source in lineage.made_from(node.id):
        _add(branch, further, source, lineage, shown)


def _line(first: str, second: str = "") -> str:
    return f"[bold]{plain(first)}[/]" + (f" [dim]{plain(second)}[/]" if second else "")


def _head(node: Node, lineage: Lineage) -> tuple[str, str]:
    aliases = ", ".join(node.facts.get("aliases") or ())
    back = node.facts.get("rolled_back")
    return node.title, ", ".join(filter(None, [aliases, f"taken down: {back}" if back else ""]))


def _lines(node: Node) -> list[str]:
    """What is said of a node, the name first."""
    facts = node.facts
    if node.kind == "step":
        took = _seconds(facts.get("seconds"))
        head = [f"{node.title} {facts['key']}", ", ".join(filter(None, [_headline(node), took]))]
        return [*head, f"MLflow run {facts['mlflow_run'] or NOT_KNOWN}" + (", reused" if facts["reused"] else "")]
    if node.kind == "table":
        rows = facts.get("rows")
        return [node.title, f"{'' if rows is None else f'{rows:,} rows, '}md5 {facts['md5']}"]
    if node.kind == "dataset":
        return [f"dataset {facts['name']}", f"version {facts['digest']}", *_of_dataset(facts)]
    if node.kind == "file":
        said = [f"{facts['rows']:,} rows" if facts.get("rows") is not None else "", _added(facts)]
        said += [f"known by {facts['known_by']}", facts.get("now") or ""]
        return [node.title, f"sha256 {facts['sha256'] or NOT_KNOWN}", ", ".join(filter(None, said))]
    if node.kind == "source":
        revision = f"revision {facts['revision']}" if facts.get("revision") else ""
        return [node.title, f"sha256 {facts['digest']}", *filter(None, [revision])]
    return [node.title]


def _headline(node: Node) -> str:
    with suppress(KeyError, TypeError, ValueError):
        return report.headline(node.title, node.facts["facts"])
    return ""


def _added(facts: Mapping[str, Any]) -> str:
    return " ".join(filter(None, [f"added {facts['added']}" if facts.get("added") else "", facts.get("by")]))


def _of_dataset(facts: Mapping[str, Any]) -> list[str]:
    found, recorded = facts.get("found_at"), facts.get("recorded_revision")
    where = f"{facts['path']} at {found}" if found else f"{facts['path']}, at no revision that is left"
    if recorded and found and recorded != found:
        where += f" (recorded as {recorded[:12]}{'+' if recorded.endswith('+') else ''})"
    counts, validation = facts.get("counts") or {}, facts.get("validation") or {}
    lines = [where]
    if validation:
        found_in = [f"{one['rows']:,} {check} ({one['done']})" for check, one in validation.get("found", {}).items()]
        checked = f"validation: {validation['read']:,} rows read, {validation['valid']:,} valid"
        lines.append("; ".join([checked, *found_in, *(f"bound broken: {b}" for b in validation["broken_bounds"])]))
    if counts:
        named = ("demonstrations", "preferences_train", "preferences_held_out", "prompts", "gold")
        lines.append("split: " + ", ".join(f"{counts[n]:,} {n.replace('_', ' ')}" for n in named if n in counts))
    source = facts.get("source") or {}
    if source.get("md5"):
        lines.append(f"{source['folder']} md5 {source['md5']}")
    return lines


def _run_branch(lineage: Lineage) -> str:
    facts = lineage.run
    lines = [_line(f"run {facts['name']}", _when(facts))]
    for title, said in run_lines(facts):
        lines.append(f"[dim]{title:<9}[/] {plain(said)}")
    return "\n".join(lines)


def run_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of how a run was run, by heading."""
    commit, state = facts["code_commit"] or facts["project_commit"], facts["code_state"]
    code = f"{_short(commit)}, {state or 'clean or not: not known'}"
    packages = facts["packages"] or f"not all known; {facts['libraries'] or 'none'}"
    hardware = [facts["processor"], f"{facts['cores']} cores" if facts["cores"] else None, facts["memory"]]
    hardware += [f"GPUs: {facts['gpus']}" if facts["gpus"] else None, facts["system"]]
    known = ", ".join(part for part in hardware if part) or facts["machine"] or NOT_KNOWN
    return [
        ("recipe", f"{facts['command'] or 'recipe.yaml of the run'}, seed {facts['seed'] or NOT_KNOWN}"),
        ("code", code),
        ("packages", packages),
        ("hardware", known),
        ("MLflow", f"run {facts['mlflow_run'] or NOT_KNOWN}"),
        ("Prefect", f"flow run {facts['prefect_flow_run']}" if facts["prefect_flow_run"] else "not run by Prefect"),
    ]


def _when(facts: Mapping[str, Any]) -> str:
    ended = facts.get("ended") or facts.get("started")
    at = f"{datetime.fromtimestamp(ended / 1000, UTC):%Y-%m-%d %H:%M} UTC" if ended else "at a time not known"
    return f"{(facts['status'] or 'status not known').lower()}, {at}"


def _short(commit: str | None) -> str:
    if not commit:
        return f"commit {NOT_KNOWN}"
    return commit[:12] + ("+" if commit.endswith("+") else "") if re.match(r"[0-9a-f]{40}", commit) else commit


def _verdict_branch(lineage: Lineage) -> str:
    verdict = lineage.verdict
    word = {True: "promoted", False: "kept back", None: NOT_KNOWN}[verdict["promote"]]
    reasons = verdict["reasons"] or ()
    return "\n".join([_line("verdict", word), *(f"[dim]{plain(str(reason))}[/]" for reason in reasons)])


def _costs(lineage: Lineage) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("step")
    for title in ("wall s", "CPU s", ""):
        table.add_column(title, justify="right" if title else "left")
    for cost in lineage.costs:
        cells = ["?" if value is None else f"{value:,.1f}" for value in (cost.wall, cost.cpu)]
        table.add_row(cost.step, *cells, "by an earlier run" if cost.reused else "")
    return table


def _energy(lineage: Lineage) -> str:
    found = total(lineage.costs, lineage.watts)
    parts = []
    for name, words in (("this_run", "this run"), ("all", "with what it reused")):
        wall, energy = found[name]["wall_seconds"], found[name]["energy_wh"]
        said = f"{wall:,.0f} s" if wall is not None else "wall time not known"
        parts.append(f"{words}: {said}, {'energy not known' if energy is None else f'{energy:.3g} Wh'}")
    return "; ".join(parts) + f" (assuming {lineage.watts:g} W for each busy core, no GPU)"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f} s"


# -- the drawing -------------------------------------------------------------------------------------------------

WIDTH, GAP, LINE, PADDING, LAYER_GAP, MARGIN = 196, 18, 15, 8, 38, 24
THIN = 26  # room a line takes on its way past a layer
CHARACTERS = 31  # of a line in a box
FOOTER = 130  # characters of a line below
COLOURS = {
    "model": "#2458a6",
    "run": "#2458a6",
    "step": "#3c8a54",
    "table": "#d1702c",
    "dataset": "#d1702c",
    "file": "#8a8f98",
    "source": "#8a5fb0",
}

SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}"
 height="{{ height }}" role="img" font-family="system-ui, sans-serif" font-size="11" fill="#1c1e21">
<title>Lineage of {{ subject }}</title>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 8 4 0 8z" fill="#8a8f98"/></marker></defs>
<rect width="100%" height="100%" fill="#fff"/>
{% for path in paths %}<path d="{{ path }}" fill="none" stroke="#8a8f98" marker-end="url(#tip)"/>
{% endfor %}
{% for box in boxes %}<g><title>{{ box.whole }}</title>
<rect x="{{ box.x }}" y="{{ box.y }}" width="{{ box.width }}" height="{{ box.height }}" rx="4" fill="#fff"
 stroke="{{ box.colour }}" stroke-width="1.5"/>
{% for line in box.lines %}<text x="{{ box.x + 8 }}" y="{{ box.y + 18 + loop.index0 * 15 }}"
{%- if loop.first %} font-weight="600" fill="{{ box.colour }}"{% endif %}>{{ line }}</text>
{% endfor %}</g>
{% endfor %}
{% for line in footer %}<text x="{{ margin }}" y="{{ below + loop.index0 * 15 }}"
{%- if line.startswith("!") %} fill="#a33b12"{% else %} fill="#5d636b"{% endif %}>{{ line.lstrip("!") }}</text>
{% endfor %}
</svg>
"""


@dataclass
class _Box:
    """A node in the drawing; one without lines is the bend of an edge that passes a layer."""

    id: str
    layer: int
    lines: list[str] = field(default_factory=list)
    whole: str = ""
    colour: str = ""
    x: float = 0.0
    y: float = 0.0
    deep: float = 0.0  # height of its layer

    @property
    def width(self) -> int:
        return WIDTH if self.lines else THIN

    @property
    def height(self) -> int:
        return 2 * PADDING + LINE * len(self.lines) if self.lines else 0

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def svg(lineage: Lineage) -> str:
    """The graph as SVG, the model at the top; all text in it is escaped.

    An edge that follows from others is left out, as the policy stands on the base by way of SFT; what the model itself
    is made from always shows.
    """
    nodes, edges = _drawn(lineage)
    layers = _layers(nodes[0].id, [node.id for node in nodes], edges)
    boxes = {node.id: _box(node, layers[node.id], lineage) for node in nodes}
    chains = [_chain(source, target, boxes) for source, target in _reduced(edges, nodes[0].id)]
    rows = _ordered(boxes, chains)
    width, below = _placed(rows)
    footer = _footer(lineage)
    text = (
        Environment(autoescape=True)
        .from_string(SVG)
        .render(
            subject=_printable(lineage.subject),
            width=max(width, 640),
            height=below + LINE * len(footer) + MARGIN,
            paths=[_path([boxes[id] for id in chain]) for chain in chains],
            boxes=[box for box in boxes.values() if box.lines],
            footer=footer,
            below=below + LINE,
            margin=MARGIN,
        )
    )
    return text


def _drawn(lineage: Lineage) -> tuple[list[Node], list[tuple[str, str]]]:
    """Nodes and edges of the drawing: very many raw files are one box."""
    files = [node for node in lineage.nodes if node.kind == "file"]
    nodes, edges = list(lineage.nodes), [(edge.source, edge.target) for edge in lineage.edges]
    if len(files) > MANY_FILES:
        kept = {node.id for node in files}
        nodes = [node for node in nodes if node.id not in kept]
        nodes.append(Node("files", "file", f"{len(files)} raw files", {"sha256": None, "known_by": "lineage.json"}))
        edges = [(source, target) for source, target in edges if source not in kept] + [("files", "dataset")]
    return nodes, edges


def _layers(top: str, ids: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Each node's layer: the longest way from the top down to it; what leads nowhere stands in the second."""
    layers = dict.fromkeys(ids, 1) | {top: 0}
    for _ in ids:
        for source, target in edges:
            layers[source] = max(layers[source], layers[target] + 1)
    return layers


def _reduced(edges: Iterable[tuple[str, str]], top: str) -> list[tuple[str, str]]:
    """The edges of a graph without circles that do not follow from others (its transitive reduction); all to `top`."""
    unique = list(dict.fromkeys(edges))
    targets: dict[str, set[str]] = {}
    for source, target in unique:
        targets.setdefault(source, set()).add(target)

    def reaches(start: str, goal: str) -> bool:
        return any(one == goal or reaches(one, goal) for one in targets.get(start, ()))

    return [(s, t) for s, t in unique if t == top or not any(reaches(o, t) for o in targets[s] if o != t)]


def _chain(source: str, target: str, boxes: dict[str, _Box]) -> list[str]:
    """From target down to source, with a bend in every layer between them."""
    bends = []
    for layer in range(boxes[target].layer + 1, boxes[source].layer):
        bend = _Box(f"{source}>{target}>{layer}", layer)
        boxes[bend.id] = bend
        bends.append(bend.id)
    return [target, *bends, source]


def _ordered(boxes: Mapping[str, _Box], chains: Sequence[Sequence[str]]) -> list[list[_Box]]:
    """The boxes of each layer from left to right, each near the mean place of those it is tied to.

    Sugiyama, Tagawa & Toda 1981, "Methods for visual understanding of hierarchical system structures", section 5.
    """
    rows: list[list[_Box]] = [[] for _ in range(1 + max(box.layer for box in boxes.values()))]
    for box in boxes.values():
        rows[box.layer].append(box)
    up: dict[str, list[str]] = {}
    down: dict[str, list[str]] = {}
    for chain in chains:
        for above, below in itertools.pairwise(chain):
            up.setdefault(below, []).append(above)
            down.setdefault(above, []).append(below)
    for sweep in range(8):
        ties, order = (up, rows[1:]) if sweep % 2 == 0 else (down, rows[-2::-1])
        place = {box.id: (n + 0.5) / len(row) for row in rows for n, box in enumerate(row)}
        for row in order:
            row.sort(key=lambda box: _mean([place[one] for one in ties.get(box.id, ())], place[box.id]))
            place |= {box.id: (n + 0.5) / len(row) for n, box in enumerate(row)}
    return rows


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _placed(rows: Sequence[Sequence[_Box]]) -> tuple[int, int]:
    """Give every box its place; (width, height) of the drawing."""
    widths = [sum(box.width for box in row) + GAP * (len(row) - 1) for row in rows]
    y = MARGIN
    for row, wide in zip(rows, widths, strict=True):
        x, deep = MARGIN + (max(widths) - wide) / 2, max(box.height for box in row)
        for box in row:
            box.x, box.y, box.deep = x, y, deep
            x += box.width + GAP
        y += deep + LAYER_GAP
    return max(widths) + 2 * MARGIN, y


def _path(chain: Sequence[_Box]) -> str:
    """A curve from the source, below, up to the target."""
    points = [(chain[-1].middle, chain[-1].y)]
    for box in reversed(chain[1:-1]):
        points += [(box.middle, box.y + box.deep), (box.middle, box.y)]
    points.append((chain[0].middle, chain[0].y + chain[0].height + 2))
    said = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
    for (x, y), (to_x, to_y) in itertools.pairwise(points):
        half = (y + to_y) / 2
        said += f" C{x:.0f} {half:.0f} {to_x:.0f} {half:.0f} {to_x:.0f} {to_y:.0f}"
    return said


def _box(node: Node, layer: int, lineage: Lineage) -> _Box:
    if node.kind in ("model", "run"):
        word = {True: "promoted", False: "kept back", None: "verdict not known"}[lineage.verdict["promote"]]
        lines = [node.title, *filter(None, [_head(node, lineage)[1]]), word]
    else:
        lines = _brief(node)
    clean = [_printable(line) for line in lines]
    whole = "\n".join(_printable(line) for line in ([node.title] if node.kind == "model" else _lines(node)))
    return _Box(node.id, layer, [_cut(line) for line in clean], whole, COLOURS[node.kind])


def _brief(node: Node) -> list[str]:
    """What fits into a box."""
    facts = node.facts
    if node.kind == "step":
        said = textwrap.wrap(_headline(node), CHARACTERS)[:3]
        return [f"{node.title} {facts['key'][:12]}", *said, *filter(None, [_seconds(facts.get("seconds"))])]
    if node.kind == "table":
        rows = [f"{facts['rows']:,} rows"] if facts.get("rows") is not None else []
        return [node.title, *rows, f"md5 {facts['md5'][:16]}"]
    if node.kind == "dataset":
        validation = facts.get("validation") or {}
        read = [f"{validation['read']:,} rows, {validation['quarantined']} set aside"] if validation else []
        found = facts.get("found_at")
        at = f"git {found[:12]}" if found and found != WORK_TREE else found
        return [node.title, *read, at or "revision not known"]
    digest = facts.get("sha256") or facts.get("digest")
    changed = ["changed since"] if str(facts.get("now", "")).startswith("changed") else []
    return [node.title, f"sha256 {digest[:16]}" if digest else str(facts.get("known_by", NOT_KNOWN)), *changed]


def _footer(lineage: Lineage) -> list[str]:
    said = [f"run {lineage.run['name']}, {_when(lineage.run)}"]
    said += [f"{title}: {text}" for title, text in run_lines(lineage.run)]
    said.append(_energy(lineage))
    lines = [part for text in said for part in textwrap.wrap(_printable(text), FOOTER, subsequent_indent="    ")]
    for word, sentences in (("not known", lineage.unknown), ("does not fit together", lineage.contradictions)):
        for sentence in sentences:
            mark = "!" if sentences is lineage.contradictions else ""
            lines += [mark + part for part in textwrap.wrap(_printable(f"{word}: {sentence}"), FOOTER)]
    return lines


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"


def _printable(text: str) -> str:
    """Text without characters XML has no way to write."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
