"""One run of a recipe: its data version, its store, its journal, its folder. Knows no orchestrator."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from steps import (
    batches,
    code,
    data_report,
    datasets,
    dead_runs,
    enough,
    heartbeat,
    lineage_page,
    locks,
    pipeline,
    policy_prompt,
    provenance,
    registry,
    report,
    retraining,
    tracking,
    versions,
)
from steps.artifact import CHART, COMPLETIONS, COSTS, MANIFEST, NEXT_ROUND
from steps.base import locate
from steps.config import Recipe
from steps.errors import EnvironmentProblem, Interrupted, PrefloopError, RecipeError
from steps.launch import launcher
from steps.paths import Var, need_space
from steps.progress import watch
from steps.run import Input, Outcome, StepSpec, Store, run_step
from steps.step_tags import STEP, StepTag
from steps.versions import DataVersion

# The numbers that stand in the parent run's row, so that comparing pipelines is comparing rows.
HEADLINES: dict[str, tuple[str, ...]] = {
    "sft": ("loss",),
    "reward": ("accuracy",),
    "policy": (
        "eval_rewards/chosen",
        "eval_rewards/rejected",
        "eval_rewards/margins",
        "eval_rewards/accuracies",
        "reward",
        "kl",
    ),
    "evaluate": (
        "win_rate",
        "win_rate_low",
        "win_rate_high",
        "win_rate_by_reward",
        "win_rate_length_controlled",
        "palms_before",
        "palms_after",
        "human_win_rate",
        "length_ratio",
        "policy_kl",
        "policy_gold",
        "policy_reward",
        "judge_accuracy",
        "champion_win_rate",
        "champion_win_rate_low",
    ),
}
VALIDATION_PAGE = "validation.html"
PREFIX = {"sft": "sft/", "reward": "reward/"}  # names that would clash in one row
LIGHT = ("base", "gate")  # steps that need no device


@dataclass(frozen=True)
class Plan:
    """What a run would do with a step: `reuse`, `run`, or `wait` for the step named in `because`."""

    step: str
    what: str
    because: str
    key: str = ""


class Experiment:
    """A recipe being run.

    Args:
        recipe: what to run.
        root: the project.
        console: where people look.
        tags: what the orchestrator wants written down, such as its own run's id.
        parent: folder of the run this one is a part of.
        meets_champion: whether the evaluation lets the policy meet the champion.
    """

    def __init__(
        self,
        recipe: Recipe,
        root: Path,
        console: Console,
        tags: Mapping[str, str] | None = None,
        parent: Path | None = None,
        meets_champion: bool = True,
    ) -> None:
        self.recipe, self.root, self.console = recipe, root, console
        self.parent, self.meets_champion = parent, meets_champion
        self.tags = dict(tags or {})
        self.var = Var(root)
        self.store = Store(self.var.folder("store"))
        self.forwarder = tracking.forwarder(self.var)
        self.launch = launcher(recipe.launch)
        self.outcomes: dict[str, Outcome] = {}
        self.known: dict[str, Input] = {}
        self.data: DataVersion | None = None
        self.data_seconds = 0.0
        self._folder: Path | None = None
        self._met: registry.Version | None = None
        self._start: registry.Version | None = None

    @property
    def folder(self) -> Path:
        """Where this run's report goes; made, with the start of its journal, when it is first asked for."""
        if self._folder is None:
            folder = new_folder(self.var, self.recipe.name)
            recipe = self.recipe.model_dump(mode="json")
            text = yaml.safe_dump(recipe, sort_keys=False)
            (folder / "recipe.yaml").write_text(text, encoding="utf-8")
            (folder / provenance.PACKAGES).write_text("\n".join(provenance.packages()) + "\n", encoding="utf-8")
            tags = {
                "prefloop.git_commit": versions.git_revision(self.root) or "no git",
                "prefloop.libraries": ", ".join(f"{k} {v}" for k, v in code.library_versions().items()),
                "prefloop.machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
                **provenance.describe(self.recipe, text),
                **self.tags,
            }
            parent = str(self.parent) if self.parent else None
            name = self.tags.get("prefloop.variant", folder.name)
            tracking.append(folder, "start", name=name, experiment=self.recipe.name, parent=parent, tags=tags)
            tracking.append(folder, "params", values=flat(self.recipe.used()))
            for file in ("recipe.yaml", provenance.PACKAGES):
                tracking.append(folder, "artifact", path=file)
            self._folder = folder
            dead_runs.close_dead(self.var, self.forwarder)
        return self._folder

    # -- the steps -----------------------------------------------------------------------------------------------

    def prepare_data(self, prepared: DataVersion | None = None) -> DataVersion:
        """Version and validate the data, and find the base model; everything a later step reads is known then.

        Args:
            prepared: the version to take as it is, where it was prepared just before.
        """
        need_space(self.var.path if self.var.path.is_dir() else self.root, self.recipe.launch.min_free_gib)
        started = time.monotonic()
        self._find_models()
        with self.console.status("data      ingest → validate → split"), ThreadPoolExecutor(1) as pool:
            name, root = self.recipe.data.name, self.root
            preparing = pool.submit(lambda: (prepared, []) if prepared else batches.refresh(name, root))
            self._import_ahead()
            self.data, drifted = preparing.result()
        self.known |= {f"data/{name}": table for name, table in self.data.tables.items()}
        self.data_seconds = time.monotonic() - started
        tags = {
            "data": self.data.name,
            "data_digest": self.data.digest,
            "data_revision": self.data.revision or "no git",
            "data_drift": ", ".join(finding.what for finding in drifted if finding.drifted) or "none",
        }
        tracking.append(self.folder, "tags", values=tags)
        tracking.append(self.folder, "inputs", datasets=self._datasets(pipeline.TABLES))
        page = datasets.folder(self.data.name, self.root) / VALIDATION_PAGE
        if page.is_file():
            shutil.copyfile(page, self.folder / page.name)
            tracking.append(self.folder, "artifact", path=page.name)
        self._forward(self.folder)
        how = "reused" if prepared else "checked"
        self._say("data", how, self.data_seconds, report.headline("data", self.data.counts))
        if prepared is None and not versions.is_committed(name, root):
            self._say("data", "note", None, "in no commit: `git add data dvc.lock && git commit` keeps this version")
        if any(finding.drifted for finding in drifted):
            data_report.print_drift(self.console, drifted, "the data", "those of the version before")
        return self.data

    def check_data(self) -> None:
        """Look whether the data suffice for every step of the recipe.

        Raises:
            DataError: they do not.
        """
        assert self.data is not None
        enough.check(self.recipe, {name: table.path for name, table in self.data.tables.items()})

    def _find_models(self) -> None:
        """What the recipe names of models that are made elsewhere."""
        self.known["source"] = locate(self.recipe.model.base, self.recipe.model.revision, self.root)
        if judge := self.recipe.evaluate.reward_model:
            self.known["classifier"] = locate(judge, self.recipe.evaluate.reward_revision, self.root)
        if topics := self.recipe.evaluate.topics:
            from steps import palms

            self.known |= palms.inputs(self.root / topics.file, self.root / topics.probes)

    def _import_ahead(self) -> None:
        """Begin to import what coming steps need, if any is to come; seconds that pass while DVC works."""
        ahead = Experiment(self.recipe, self.root, self.console)
        ahead.forwarder = self.forwarder
        try:
            coming = [plan.step for plan in ahead.plan() if plan.what != "reuse"]
        except PrefloopError:  # the data is not there yet
            coming = list(self.recipe.steps)
        if coming:
            self.launch.prepare([pipeline.module_of(name, self.recipe) for name in coming])
        _ = self.forwarder.client

    def spec(self, name: str) -> StepSpec:
        """What a step is, from what is known so far."""
        return pipeline.spec(name, self.recipe, self.known)

    def run(self, name: str) -> Outcome:
        """Find a step's artifact or make it, with its curves in MLflow and a bar on the terminal.

        Raises:
            PrefloopError: with the command that repeats just this step.
        """
        try:
            self._find_others(name)
            spec = self.spec(name)
        except PrefloopError:
            self._end("FAILED")
            raise
        return self.make(name, spec, pipeline.tables_of(name, self.recipe))

    def make(self, name: str, spec: StepSpec, tables: list[str]) -> Outcome:
        """Find the artifact of a spec or make it; also of work beside the pipeline, on what its steps made.

        Args:
            tables: of the data, what it reads.

        Raises:
            PrefloopError: with the command that repeats just this step, where it is one of the pipeline's.
        """

        def start(partial: Path, resumed: bool) -> None:
            tags = {"prefloop.step": name, "prefloop.key": spec.key, "prefloop.resumed": str(resumed)}
            tracking.append(
                partial, "start", name=spec.name, experiment=self.recipe.name, parent=str(self.folder), tags=tags
            )
            if not tracking.has(partial, "params"):
                tracking.append(partial, "params", values=flat({"seed": spec.seed, **spec.config}))
            if tables and not tracking.has(partial, "inputs"):
                tracking.append(partial, "inputs", datasets=self._datasets(tables))

        def work(partial: Path) -> None:
            with watch(name, partial, self.console, each=lambda: self._forward(partial)):
                self.launch(partial)

        if name == "policy" and self.recipe.policy.start == "champion":
            start_at = f"training starts at {self._start.uri}" if self._start else None
            self._say(name, "start", None, start_at or "no champion yet, training starts at the SFT model")
        try:
            with self._device(name, spec):
                outcome = run_step(spec, self.store, work, start)
        except PrefloopError as error:
            self._end("FAILED", self.store.partial(spec))
            if name in Recipe.STEPS:
                error.then = error.then or f"`{self.repeat_command(name)}` repeats just this step"
            raise
        except KeyboardInterrupt as stop:
            self._end("KILLED", self.store.partial(spec))
            raise Interrupted(
                f"stopped in the {name} step; nothing is lost",
                then="the same command again goes on at the newest checkpoint",
            ) from stop
        except BaseException:  # an orchestrator cancels the run
            self._end("KILLED", self.store.partial(spec))
            raise
        self._note(name, outcome)
        return outcome

    @contextmanager
    def _device(self, name: str, spec: StepSpec) -> Iterator[None]:
        """While the body runs, no other run of this project trains on our devices; waits until that is so.

        Taken before the step's own lock, always, so that two runs never wait for each other.
        """
        if name in LIGHT or self.store.find(spec):
            yield
            return
        holder = f"`{name}` of {self.tags.get('prefloop.command') or self.recipe.name}"
        with locks.held(
            self.var.folder("locks"), locks.devices(), holder, lambda whom: self._say(name, "waits", None, whom)
        ):
            yield

    def run_one(self, name: str, *, again: bool) -> Outcome:
        """Run a single step whose inputs are known and close the books on it.

        Args:
            again: run it although its artifact is there; the old one is dropped first.
        """
        if name not in self.recipe.steps:
            raise RecipeError(f"this recipe has no step '{name}'", have=", ".join(self.recipe.steps))
        self._find_others(name)
        if again:
            self.store.forget(self.spec(name))
        outcome = self.run(name)
        self.close()
        return outcome

    def close(self) -> None:
        """Close the books on a run that ends without a report."""
        tracking.append(self.folder, "end", status="FINISHED")
        self._forward(self.folder)

    def _end(self, status: str, partial: Path | None = None) -> None:
        """Close this run's books, and those of the step it was in."""
        for folder in (partial, self.folder):
            if folder is not None and folder.is_dir():
                tracking.append(folder, "end", status=status)
                self._forward(folder)

    def _note(self, name: str, outcome: Outcome) -> None:
        artifact = outcome.artifact
        if not outcome.reused:
            drawn = tracking.curves(artifact.path)
            numbers = {name: value for name, value in artifact.facts.items() if is_number(value) and name not in drawn}
            spent = {cost: getattr(artifact, cost) for cost in COSTS}
            numbers |= {what: value for what, value in spent.items() if value is not None}
            tracking.append(artifact.path, "metrics", step=0, values=numbers)
            for file in (MANIFEST, CHART):
                tracking.append(artifact.path, "artifact", path=file)
            tracking.append(artifact.path, "end", status="FINISHED")
        self.outcomes[name] = outcome
        self.known[name] = Input(artifact.path, artifact.digest)
        self._forward(artifact.path)
        row = {
            PREFIX.get(name, "") + fact: artifact.facts[fact]
            for fact in HEADLINES.get(name, ())
            if fact in artifact.facts
        }
        if row:
            tracking.append(self.folder, "metrics", step=0, values=row)
        said = StepTag(artifact.key, self.forwarder.run_id(artifact.path) or "not sent yet", outcome.reused)
        alarms = artifact.facts.get("alarms", ())
        tags = {f"alarm.{alarm['name']}": f"{alarm['action']} in {name}: {alarm['message']}" for alarm in alarms}
        tags[STEP + name] = str(said)
        tracking.append(self.folder, "tags", values=tags)
        self._forward(self.folder)
        self._say(name, "reused" if outcome.reused else "done", outcome.seconds, report.headline(name, artifact.facts))
        for alarm in alarms:
            self._say("", "alarm", None, f"{alarm['name']} ({alarm['action']}): {alarm['message']}")

    def _find_others(self, name: str) -> None:
        """Find what a step reads of earlier runs."""
        if name == "policy" and self.recipe.policy.start == "champion":
            self._find_start()
        if name == "evaluate" and self.meets_champion:
            self._find_champion()

    def _find_start(self) -> None:
        """Let training begin at the champion, or at the SFT model while there is none."""
        self._start = registry.champion(self.forwarder.client, self.recipe.name)
        if self._start is None:
            return
        start = self.adapter_of(self._start)
        after, method = policy_prompt.asked_after(start.path / "adapter"), self.recipe.policy.method
        if after and method != "chain_of_hindsight":
            raise PrefloopError(
                f"{method} cannot begin at the champion, which answers well only when asked with words of its own",
                where=self._start.uri,
                have=f"every prompt has to end with {after!r}, and {method} trains without",
                then="set policy.start=sft, or policy.method=chain_of_hindsight",
            )
        self.known["start"] = start

    def _find_champion(self) -> None:
        """Let the evaluation meet the champion; a policy that is the champion itself, the one it met before."""
        self._met = registry.champion(self.forwarder.client, self.recipe.name)
        if self._met is not None and self._met.tags.get("policy_digest") == self._policy_digest():
            self._met = registry.met_by(self.forwarder.client, self._met)
        if self._met is not None:
            self.known["champion"] = self.adapter_of(self._met)

    def adapter_of(self, version: registry.Version) -> Input:
        """A registered adapter, as an input of a step.

        Raises:
            PrefloopError: it stands on another base model.
        """
        if version.tags.get("base_digest") != self.known["base"].digest:
            raise PrefloopError(
                "the champion stands on another base model, so the two cannot answer side by side",
                where=version.uri,
                have=f"its base is {version.tags.get('base')}, the recipe's {self.recipe.model.base}",
                then="give the recipe another `name`",
            )
        folder = registry.fetch_adapter(self.forwarder.client, version, self.var.folder("champions"))
        return Input(folder, str(version.tags["policy_digest"]))

    def _policy_digest(self) -> str:
        return registry.adapter_digest(self.known["policy"].path)

    def register(self) -> registry.Version:
        """Put the policy into the model registry; the gate's verdict decides its alias.

        Raises:
            EnvironmentProblem: the registry cannot be reached; everything else of the run is kept.
        """
        verdict = self.outcomes["gate"].artifact.facts
        policy = self.outcomes["policy"].artifact
        model = self.folder / "model"
        shutil.copytree(policy.path / "adapter", model / "adapter", dirs_exist_ok=True)
        shutil.copyfile(self.folder / "recipe.yaml", model / "recipe.yaml")
        text = self.markdown(f"models:/{self.recipe.name}")
        (model / "README.md").write_text(text, encoding="utf-8")
        tracking.append(self.folder, "artifact", path="model", under="model")
        if not self.forwarder.forward(self.folder, now=True):
            registry.champion(self.forwarder.client, self.recipe.name)  # raises, saying what is wrong
            raise EnvironmentProblem(
                "the run cannot be sent to MLflow, so its model cannot be registered",
                where=self.forwarder.uri,
                have=self.forwarder.problem.splitlines()[0],
                then="mend that, then run again: finished steps are reused",
            )
        assert self.data is not None
        tags = {
            "policy_digest": self._policy_digest(),
            "evaluation": self.outcomes["evaluate"].artifact.key,
            "base": self.recipe.model.base,
            "base_digest": self.known["base"].digest,
            "data": self.data.name,
            "data_digest": self.data.digest,
            "data_revision": self.data.revision or "no git",
            "data_valid": versions.outputs(self.data.name, self.root)["valid.parquet"],
            "recipe_digest": retraining.recipe_digest(self.recipe),
            "run": self.folder.name,
            "start": self._start.uri if self._start else "sft",
            registry.MET: self._met.version if self._met else "none",
            "verdict": " | ".join(verdict["reasons"]),
            **{STEP + name: outcome.artifact.key for name, outcome in self.outcomes.items()},
        }
        turn = [f"registering {self.recipe.name}"]  # else two runs of one recipe would both find nothing registered
        with locks.held(self.var.folder("locks"), turn, self.folder.name, lambda whom: None):
            return registry.register(
                self.forwarder.client,
                self.recipe.name,
                str(self.forwarder.run_id(self.folder)),
                "model",
                tags,
                promote=verdict["promote"],
                description=text,
            )

    # -- what is left behind -------------------------------------------------------------------------------------

    def finish(self, model: str) -> str:
        """Write report, pictures and the last of the journal; print the report.

        Args:
            model: the registered version's address.

        Returns:
            the report as Markdown.
        """
        facts = {name: outcome.artifact.facts for name, outcome in self.outcomes.items()}
        folders = {name: outcome.artifact.path for name, outcome in self.outcomes.items()}
        for name, folder in folders.items():
            if (folder / CHART).is_file():
                shutil.copyfile(folder / CHART, self.folder / f"{'report' if name == 'evaluate' else name}.png")
        if (aim := folders["evaluate"] / NEXT_ROUND).is_file():
            shutil.copyfile(aim, self.folder / NEXT_ROUND)
            tracking.append(self.folder, "artifact", path=NEXT_ROUND)
        text = self.markdown(model)
        (self.folder / "report.md").write_text(text, encoding="utf-8")
        for file in [*sorted(self.folder.glob("*.png")), self.folder / "report.md"]:
            tracking.append(self.folder, "artifact", path=file.name)
        said = {"promoted": facts["gate"]["promote"], "verdict": " | ".join(facts["gate"]["reasons"])}
        tracking.append(self.folder, "tags", values={"model": model, **said})
        lineage_page.leave(self.folder, self.root, self.forwarder, model)
        tracking.append(self.folder, "end", status="FINISHED")
        waiting = filter(self.forwarder.waiting, (self.folder, *folders.values()))
        sent = all(self.forwarder.forward(folder, now=True) for folder in waiting)
        hints = [
            ("report", f"{_short(self.folder / 'report.md')} and report.png"),
            ("open the UIs", "prefloop ui"),
            ("repeat one step", self.repeat_command("policy")),
        ]
        if not sent:
            hints.append(("not sent yet", f"{self.forwarder.problem}; the next run sends it"))
        report.print_report(
            self.console,
            self._rows(),
            report.findings(facts),
            report.examples(folders["evaluate"] / COMPLETIONS),
            facts["gate"],
            model,
            hints,
        )
        return text

    def markdown(self, model: str) -> str:
        """The run's report as Markdown."""
        facts = {name: outcome.artifact.facts for name, outcome in self.outcomes.items()}
        completions = self.outcomes["evaluate"].artifact.path / COMPLETIONS
        shown = report.examples(completions)
        return report.markdown(self.folder.name, self._rows(), report.findings(facts), shown, facts["gate"], model)

    def _rows(self) -> list[tuple[str, str, str, str]]:
        assert self.data is not None
        return report.step_rows(self.outcomes, self.data.counts, self.data_seconds)

    def metrics(self) -> dict[str, float]:
        """The headline numbers, as they stand in the parent run's row."""
        return {
            PREFIX.get(name, "") + fact: outcome.artifact.facts[fact]
            for name, outcome in self.outcomes.items()
            for fact in HEADLINES.get(name, ())
            if fact in outcome.artifact.facts
        }

    def send_what_waits(self) -> None:
        """Send the journals of earlier runs that a dead tracking server did not get."""
        folders = [*self.var.folder("runs").iterdir(), *(path for path in self.store.path.iterdir() if path.is_dir())]
        for folder in sorted(folders, key=lambda path: path.parent.name):  # runs before steps: parents first
            if self.forwarder.waiting(folder) and not folder.name.endswith(".partial"):
                self._forward(folder)

    def _forward(self, folder: Path) -> bool:
        return self.forwarder.forward(folder)

    # -- without running -----------------------------------------------------------------------------------------

    def plan(self) -> Iterator[Plan]:
        """What `run` would do, step by step, as far as it can be known without running. Data is taken as it is."""
        self._find_models()
        self.data = versions.current(self.recipe.data.name, self.root)
        self.known |= {f"data/{name}": table for name, table in self.data.tables.items()}
        for name in self.recipe.steps:
            try:
                if name != "evaluate" or "policy" in self.known:
                    self._find_others(name)
                spec = self.spec(name)
            except KeyError as missing:
                yield Plan(name, "wait", f"follows {missing.args[0]}")
                continue
            found = self.store.find(spec)
            if found:
                self.known[name] = Input(found.path, found.digest)
                yield Plan(name, "reuse", report.headline(name, found.facts), spec.key)
            else:
                begun = self.store.partial(spec).is_dir()
                yield Plan(name, "run", "resumes what was begun" if begun else "not in the store", spec.key)

    def repeat_command(self, name: str) -> str:
        """The command that repeats one step of this run."""
        recipe = self.tags.get("prefloop.command") or _short(self.folder / "recipe.yaml")
        return f"prefloop step {name} {recipe} --force"

    # -- small things --------------------------------------------------------------------------------------------

    def _datasets(self, tables: tuple[str, ...] | list[str]) -> list[dict[str, Any]]:
        assert self.data is not None
        return [
            {
                "name": f"{self.data.name}/{table}",
                "md5": self.data.tables[table].digest,
                "path": f"data/{self.data.name}/{table}.parquet",
                "revision": self.data.revision,
                "rows": self.data.counts.get(table, 0),
                "context": table,
            }
            for table in tables
        ]

    def _say(self, name: str, how: str, seconds: float | None, line: str) -> None:
        took = " " * 8 if seconds is None else f"{seconds:6.1f} s"
        style = "yellow" if how == "alarm" else "dim"
        self.console.print(f"{name:<9} [{style}]{how:<8}[/] {took}  {line}", highlight=False, soft_wrap=True)


def new_folder(var: Var, name: str) -> Path:
    """A folder for one run's report, named by time."""
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    for number in itertools.count(1):
        folder = var.folder("runs") / (stamp if number == 1 else f"{stamp}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            heartbeat.begin(folder)
            return folder
    raise AssertionError


def is_number(value: Any) -> bool:
    """Whether a fact can be a metric."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names, for MLflow's parameters."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{prefix}{re.sub(r'[^A-Za-z0-9_ ./-]', '_', str(name))}"
        values |= flat(value, f"{dotted}.") if isinstance(value, Mapping) else {dotted: value}
    return values


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
