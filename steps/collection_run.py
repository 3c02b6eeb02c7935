"""A collection being run: what each round was asked, judged and came to, on disk as it goes. Knows no orchestrator.

`var/collections/NAME` holds a folder for each round: `asked.parquet` and `begun.json` when it begins,
`candidates.parquet` when answers were drawn, the batch of rows when they were judged, and `round.json` at its end. What
is there is not done again, so a collection that was stopped goes on where it was. Answers and scores themselves are
artifacts of the store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.dataset as tables
from rich.console import Console
from rich.markup import escape

from steps import batches, blind, collection, datasets, pipeline, registry, tracking, versions
from steps.artifact import digest_file, digest_json, open_artifact
from steps.collection import COMPARING, OFF, ON, SAMPLES, SCORES, VERDICTS, Collecting, Round, Stopped
from steps.config import Recipe, assigned
from steps.data_report import print_addition
from steps.errors import DataError, RecipeError
from steps.experiment import Experiment, flat, new_folder
from steps.judges import Comparison
from steps.launch import launcher
from steps.paths import Var
from steps.registry import Version
from steps.report import plain, plain_table
from steps.retraining import recipe_digest
from steps.run import Input, StepSpec
from steps.step_tags import STEP
from steps.verdicts import STORE, VerdictStore
from steps.versions import DataVersion

ASKED, CANDIDATES, BEGUN = "asked.parquet", "candidates.parquet", "begun.json"
JUDGED, FINISHED = "judged.json", "round.json"
SHOWN = 3  # rows of a sheet that a message names


@dataclass(frozen=True)
class Begun:
    """A round under way: what stays as it is, however often it is taken up.

    Attributes:
        sampled: address of the model whose answers are judged.
        version: its number.
        champion: address of the champion when the round began; empty where there was none.
        seed: of the answers.
        data: digest of the version the prompts were taken from.
    """

    number: int
    sampled: str
    version: str
    policy_digest: str
    champion: str
    seed: int
    data: str
    prompts: int


class CollectionRun:
    """Rounds of collection with one recipe, one judge and one way to ask.

    The number of rounds, the budget and the patience only say when it ends: with other ones it is the same collection.

    Args:
        recipe: its dataset is the one that grows.
        tags: what the orchestrator wants written down.

    Attributes:
        place: where its rounds are kept.
        done: the rounds that were finished, also by earlier calls.
        data: the present version of the dataset, once it was looked up.

    Raises:
        PrefloopError: settings no round can be made of, or a dataset that takes no rows.
    """

    def __init__(
        self, recipe: Recipe, how: Collecting, root: Path, console: Console, tags: Mapping[str, str] | None = None
    ) -> None:
        collection.check(how)
        self.recipe, self.how, self.root, self.console = recipe, how, root, console
        self.tags = dict(tags or {})
        self.name, self.entry = recipe.data.name, datasets.dataset(recipe.data.name, root)
        self._check_dataset()
        if how.judge == "reward" and "reward" not in recipe.steps:
            raise RecipeError("the judge 'reward' needs a reward model", where=recipe.name, have="a recipe without one")
        self.judging = _judging(recipe) if how.judge == "llm" else None
        self.var = Var(root)
        said = how.model_dump(include={"judge", "per_prompt", "prompts", "pairs"})
        key = digest_json([recipe_digest(recipe), said])[:8]
        self.place = self.var.folder("collections") / f"{recipe.name}-{how.judge}-{key}"
        self.forwarder = tracking.forwarder(self.var)
        self.launch = launcher(recipe.launch)
        self.done: list[Round] = []
        self.catch_up()
        self.data: DataVersion | None = None
        self._folder: Path | None = None
        self._experiment: Experiment | None = None

    def _check_dataset(self) -> None:
        if not batches.takes_files(self.entry):
            raise DataError(
                f"no rows can be added to '{self.name}'",
                where=str(datasets.REGISTRY),
                have="its source is fetched whole, or joins two files",
                then="collect into a dataset of preferences: docs/collection.md shows how to make one of its pairs",
            )
        collection.check_takes_pairs(self.name, self.entry)

    @property
    def folder(self) -> Path:
        """The journal of this call, a run in MLflow; made when a round first needs it."""
        if self._folder is None:
            self._folder = new_folder(self.var, f"{self.recipe.name}-collected")
            tags = {**self.tags, "prefloop.collection": self.place.name}
            start = {"name": self._folder.name, "experiment": self.recipe.name, "parent": None, "tags": tags}
            tracking.append(self._folder, "start", **start)
            values = {"collection": self.how.model_dump(mode="json"), **self.recipe.used()}
            tracking.append(self._folder, "params", values=flat(values))
            for one in self.done:  # so that the newest run shows every round
                self._log(one)
            self.forwarder.forward(self._folder)
        return self._folder

    # -- where it is ---------------------------------------------------------------------------------------------

    def _round(self, number: int) -> Path:
        return self.place / f"round-{number}"

    def catch_up(self) -> None:
        """Take in the rounds whose end is on disk, whoever ran them."""
        while (path := self._round(len(self.done) + 1) / FINISHED).is_file():
            self.done.append(Round(**_read(path)))
        self._before = len(self.done)

    def begun(self) -> Begun | None:
        """The round that was begun and not finished."""
        path = self._round(len(self.done) + 1) / BEGUN
        return Begun(**_read(path)) if path.is_file() else None

    def look_up(self) -> Stopped | None:
        """Bring the data up to date; why the collection is at its end, or None when a round is due.

        Raises:
            DataError: the dataset has no training pairs, or no human ratings where the judge is `gold`.
            EnvironmentProblem: another process is working on the data.
        """
        if len(self.done) >= self.how.rounds and self.begun() is None:
            return "rounds"
        self.data, _ = batches.refresh(self.name, self.root)
        if self.how.judge == "gold" and not self.data.counts.get("gold"):
            raise DataError(
                "the judge 'gold' needs human ratings no step learns from",
                where=self.name,
                have="an empty gold table",
                then="leave some of the data for gold, or take another --judge",
            )
        left = len(self._left())
        return None if self.begun() else collection.stopped(self.how, self.done, left)

    def ended(self, why: Stopped) -> str:
        """Why it ended, in words.

        Raises:
            DataError: a round was asked for, and every prompt had been sampled before.
        """
        said = collection.in_words(why, self.how, self.done)
        if why == "prompts" and len(self.done) == self._before:
            raise DataError(
                said,
                where=f"{self.place.name}, round {len(self.done) + 1} of {self.how.rounds}",
                have="no prompt left",
                then=f"`prefloop data add {self.name} FILE` with further prompts, or collect with another --judge",
            )
        return said

    def _left(self) -> pd.DataFrame:
        """Prompts no round has sampled."""
        asked = [
            prompt
            for number in range(1, len(self.done) + 1)
            for prompt in datasets.read_table(self._round(number) / ASKED, columns=["prompt"])["prompt"]
        ]
        table = datasets.read_table(datasets.folder(self.name, self.root) / "preferences.parquet")
        return collection.prompts_left(table, asked, self.recipe.seed)

    def model(self) -> Version | None:
        """The current policy: the champion or, where the gate let none pass, the newest version; None without any."""
        client = self.forwarder.client
        known = registry.versions_of(client, self.recipe.name)
        return registry.champion(client, self.recipe.name) or (known[-1] if known else None)

    # -- a round -------------------------------------------------------------------------------------------------

    def begin(self) -> Begun:
        """The round that was begun, or the next one: whom it asks, and what."""
        if found := self.begun():
            self._say("goes on", f"round {found.number}: {found.prompts} prompts for {found.sampled}")
            return found
        model, number = self.model(), len(self.done) + 1
        assert model is not None and self.data is not None
        champion = registry.champion(self.forwarder.client, self.recipe.name)
        asked = self._left().head(self.how.prompts)
        place = self._round(number)
        place.mkdir(parents=True, exist_ok=True)
        datasets.write_table(asked, place / ASKED)
        begun = Begun(
            number=number,
            sampled=model.uri,
            version=model.version,
            policy_digest=str(model.tags["policy_digest"]),
            champion=champion.uri if champion else "",
            seed=collection.round_seed(self.recipe.seed, number),
            data=self.data.digest,
            prompts=len(asked),
        )
        _write(asdict(begun), place / BEGUN)
        self._say("begins", f"round {number}: {begun.prompts} prompts for {begun.sampled}")
        return begun

    def sample(self, begun: Begun) -> None:
        """Draw the model's answers, and leave those that are to be judged."""
        place, recipe = self._round(begun.number), self.recipe
        if (place / CANDIDATES).is_file():
            return
        experiment = self._ready(begun)
        version = registry.find(self.forwarder.client, recipe.name, begun.version)
        spec = StepSpec(
            step="sample",
            function="steps.collection_steps:draw_answers",
            config={
                "sampling": recipe.evaluate.sampling.model_dump(mode="json"),
                "dtype": recipe.model.dtype,
                "per_prompt": self.how.per_prompt,
            },
            inputs={
                "base": experiment.known["base"],
                "policy": experiment.adapter_of(version),
                "asked": _file(place / ASKED),
            },
            seed=begun.seed,
        )
        drawn = experiment.make("sample", spec, ["preferences"]).artifact
        samples = datasets.read_table(drawn.path / SAMPLES)
        asked = datasets.read_table(place / ASKED)
        datasets.write_table(collection.candidates(asked, samples, self.how, _fits), place / CANDIDATES)

    def _ready(self, begun: Begun) -> Experiment:
        """A run with the base model, and with the reward model of the present data where that judges."""
        if self._experiment is None:
            tags = {**self.tags, "prefloop.variant": f"round {begun.number}"}
            found = Experiment(self.recipe, self.root, self.console, tags, self.folder)
            found.launch = self.launch
            found.prepare_data(self.data)
            needed = {"base"}
            if self.how.judge == "reward":
                needed |= {"reward", *pipeline.before("reward", self.recipe)}
            for step in Recipe.STEPS:
                if step in needed:
                    found.run(step)
            self._experiment = found
        return self._experiment

    def judge(self, begun: Begun) -> str:
        """Have the answers judged and write the batch; what people have to do first, or nothing."""
        if self._batch(begun).is_file():
            return ""
        candidates = datasets.read_table(self._round(begun.number) / CANDIDATES)
        if self.how.judge == "file":
            verdicts, waits = self._asked_people(begun, candidates)
            if verdicts is None:
                return waits
            judged, silent = collection.by_verdicts(candidates, verdicts)
            identity = f"{blind.JUDGE}:{self._sheet(begun).stem}"
        else:
            label = self._label(begun)
            identity = label.facts["identity"]
            if self.how.judge in COMPARING:
                judged, silent = collection.by_verdicts(candidates, datasets.read_table(label.path / VERDICTS))
            else:
                judged, silent = collection.by_scores(datasets.read_table(label.path / SCORES)), 0
        pairs, ties = collection.pairs_of(judged, self.how.pairs)
        found = Round(
            number=begun.number,
            sampled=begun.sampled,
            policy_digest=begun.policy_digest,
            prompts=begun.prompts,
            samples=begun.prompts * self.how.per_prompt,
            candidates=len(candidates),
            labels=collection.labels_in(candidates, self.how.judge),
            on_policy=sum(pair.kind == ON for pair in pairs),
            off_policy=sum(pair.kind == OFF for pair in pairs),
            ties=ties,
            silent=silent,
            margin=sum(pair.margin for pair in pairs) / len(pairs) if pairs else None,
        )
        _write(asdict(found), self._round(begun.number) / JUDGED)
        text = collection.batch(pairs, self.entry, self.how.judge, self._origin(begun, identity))
        versions.put(text.encode(), self._batch(begun))
        self._let_go()
        return ""

    def _let_go(self) -> None:
        """Close the books on the run that sampled and judged."""
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None

    def _label(self, begun: Begun) -> Any:
        """The artifact of the judge's word on a round's answers."""
        experiment, candidates = self._ready(begun), _file(self._round(begun.number) / CANDIDATES)
        if self.judging is not None:
            config: dict[str, Any] = {"evaluate": self.judging.evaluate.model_dump(mode="json")}
            function, reads = "compare_answers", {}
        else:
            config = {"judge": self.how.judge, "dtype": self.recipe.model.dtype}
            function = "score_answers"
            reads = {"gold": "data/gold"} if self.how.judge == "gold" else {"base": "base", "reward": "reward"}
        inputs = {"candidates": candidates, **{name: experiment.known[given] for name, given in reads.items()}}
        spec = StepSpec("label", f"steps.collection_steps:{function}", config, inputs, seed=0)
        return experiment.make("label", spec, ["gold"] if "gold" in reads else []).artifact

    def _origin(self, begun: Begun, identity: str) -> dict[str, Any]:
        """What stands in every row of a round."""
        sampling = self.recipe.evaluate
        return {
            "collection": self.place.name,
            "round": begun.number,
            "model": begun.sampled,
            "policy_digest": begun.policy_digest,
            "data_digest": begun.data,
            "judge": self.how.judge,
            "judge_identity": identity,
            "seed": begun.seed,
            "per_prompt": self.how.per_prompt,
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
        }

    def _batch(self, begun: Begun) -> Path:
        """The batch of a round; its name says which model was sampled, for lineages name raw files."""
        model = re.sub(r"[^A-Za-z0-9._-]", "_", f"{self.recipe.name}-v{begun.version}")
        key = self.place.name.rpartition("-")[2]
        return self._round(begun.number) / f"collected-{model}-{self.how.judge}-{key}-round{begun.number}.jsonl"

    def add(self, begun: Begun) -> Round:
        """Add the round's pairs to the dataset, as `prefloop data add` does; the round, with what became of them."""
        found = Round(**_read(self._round(begun.number) / JUDGED))
        if not found.pairs:
            return found
        added = batches.add(self.name, [self._batch(begun)], self.root)
        print_addition(self.console, added)
        self.data = versions.current(self.name, self.root)
        valid = tables.dataset(datasets.folder(self.name, self.root) / "valid.parquet")
        rows = valid.count_rows(filter=tables.field("file") == self._batch(begun).name)
        return replace(found, rows=rows, quarantined=found.pairs - rows)

    def finish(self, begun: Begun, found: Round) -> Round:
        """Close a round with what training on the new version came to."""
        if found.rows and (trained := self._trained()):
            champion = registry.champion(self.forwarder.client, self.recipe.name)
            facts = self._evaluation(trained)
            found = replace(
                found,
                trained=trained.uri,
                promoted=champion is not None and champion.uri == trained.uri != begun.champion,
                win_rate=facts.get("win_rate"),
                champion_win_rate=facts.get("champion_win_rate"),
            )
        self._log(found)
        _write(asdict(found), self._round(begun.number) / FINISHED)
        self.done.append(found)
        self.forwarder.forward(self.folder)
        verdict = "new champion" if found.promoted else "no new champion"
        self._say("done", f"round {found.number}: {found.pairs} pairs for {found.labels:,} labels, {verdict}")
        return found

    def _trained(self) -> Version | None:
        """The newest model of the present version of the data."""
        assert self.data is not None
        wanted = (self.data.name, self.data.digest)
        known = registry.versions_of(self.forwarder.client, self.recipe.name)
        made = [one for one in known if (one.tags.get("data"), one.tags.get("data_digest")) == wanted]
        return made[-1] if made else None

    def _evaluation(self, version: Version) -> Mapping[str, Any]:
        """The facts a version was judged by; none where its artifact is gone."""
        key = version.tags.get(f"{STEP}evaluate")
        artifact = open_artifact(self.var.folder("store") / f"evaluate-{key}")
        return artifact.facts if artifact else {}

    # -- people --------------------------------------------------------------------------------------------------

    def _sheet(self, begun: Begun) -> Path:
        return self._round(begun.number) / f"{self.place.name}-round{begun.number}.csv"

    def _asked_people(self, begun: Begun, candidates: pd.DataFrame) -> tuple[pd.DataFrame | None, str]:
        """People's verdicts on every two answers, or None and what they have to do."""
        asked, sheet, keys = collection.duels(candidates), self._sheet(begun), self.var.folder("blind")
        if asked.empty:
            return asked.assign(preference=[]), ""
        if not sheet.is_file():
            table = asked.rename(columns={"first": "policy", "second": "other"})
            datasets.write_table(table, sheet.with_suffix(".parquet"))
            blind.export(sheet.with_suffix(".parquet"), sheet, keys, rival="other", repeat=0, seed=begun.seed)
        try:
            said = blind.read_back([sheet], keys)
        except DataError as error:
            if not error.what.startswith("no row of the files counts"):
                raise
            return None, self._to_fill_in(sheet, len(asked), [])
        if missing := len(asked) - len(said.verdicts):
            rows = [f"row {problem.row}: {problem.what}" for problem in said.problems[:SHOWN]]
            return None, self._to_fill_in(sheet, missing, rows)
        store = VerdictStore(self.var.folder("verdicts") / STORE)
        blind.read_back([sheet], keys, store)
        return asked.assign(preference=[_told(store, sheet.stem, *row) for row in asked.itertuples(index=False)]), ""

    def _to_fill_in(self, sheet: Path, missing: int, rows: list[str]) -> str:
        shown = "".join(f"\n  {row}" for row in rows)
        return (
            f"{missing:,} comparisons wait for people: in {sheet} write A, B or tie into the column `better`, "
            f"save it there, and run the same command again{shown}"
        )

    # -- what is left behind -------------------------------------------------------------------------------------

    def _log(self, one: Round) -> None:
        folder = self.folder
        tracking.append(folder, "metrics", step=one.number, values=one.metrics())
        said = {"sampled": one.sampled, "trained": one.trained or "nothing"}
        tracking.append(folder, "tags", values={f"round.{one.number}.{name}": value for name, value in said.items()})

    def close(self, status: str, why: str = "") -> None:
        """End the journal of this call, where it has one."""
        if self._folder is None:
            return
        if status == "FINISHED":
            self._let_go()
        if why:
            tracking.append(self._folder, "tags", values={"prefloop.stopped": why})
        tracking.append(self._folder, "end", status=status)
        self.forwarder.forward(self._folder)

    def table(self) -> list[dict[str, Any]]:
        """The rounds for an orchestrator's page."""
        return [{name: value for name, value in asdict(one).items() if value is not None} for one in self.done]

    def show(self, why: str) -> None:
        """Print the rounds, and why it ended."""
        right = ("round", "labels", "on", "off", "ties", "margin", "rows", "over start", "champion")
        table = plain_table("round", "sampled", *right[1:], "trained", "", right=right)
        for one in self.done:
            margin = "" if one.margin is None else f"{one.margin:.2f}"
            counts = [f"{count:,}" for count in (one.labels, one.on_policy, one.off_policy, one.ties)]
            rates = [_share(one.win_rate), _share(one.champion_win_rate)]
            promoted = "promoted" if one.promoted else "kept back" if one.trained else "not trained"
            cells = [f"{one.number}", _version(one.sampled), *counts, margin, f"{one.rows:,}", *rates]
            table.add_row(*map(plain, (*cells, _version(one.trained), promoted)))
        self.console.print()
        if self.done:
            self.console.print(table)
        self._say("ends", why)

    def _say(self, how: str, line: str) -> None:
        self.console.print(f"{'collect':<9} [dim]{how:<8}[/]  {escape(line)}", soft_wrap=True, highlight=False)


def _judging(recipe: Recipe) -> Recipe:
    """The recipe with its language model as the judge.

    Raises:
        RecipeError: it describes none.
    """
    if recipe.evaluate.llm is None:
        raise RecipeError(
            "the judge 'llm' needs the section evaluate.llm",
            where="evaluate.llm",
            have="none",
            then="give it base_url and model at least",
        )
    return assigned(recipe, {"evaluate.judge": "llm"})


def _fits(text: str) -> bool:
    """Whether a row may hold a text: what validation would set aside is not worth a label."""
    from steps.checks import CONTROL

    return bool(text.strip()) and not re.search(CONTROL, text)


def _told(store: VerdictStore, rater: str, prompt: str, first: str, second: str) -> float:
    """What a rater said of the first answer, whichever side it was shown on; NaN without a verdict."""
    asked, identity = Comparison(prompt, first, second), f"{blind.JUDGE}:{rater}"
    if there := store.get(identity, asked):
        return there.preference
    back = store.get(identity, asked.swapped())
    return 1 - back.preference if back else float("nan")


def _file(path: Path) -> Input:
    return Input(path, digest_file(path))


def _version(uri: str) -> str:
    return uri and f"v{uri.rpartition('/')[2]}"


def _share(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.2f}"


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _write(values: Mapping[str, Any], path: Path) -> None:
    versions.put(json.dumps(values, indent=1, ensure_ascii=False).encode(), path)
