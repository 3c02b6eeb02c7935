"""The recipe: what it accepts, and what it says of a recipe it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from steps.config import SECTIONS, Recipe, keyed, load, parse, read_yaml, section
from steps.errors import RecipeError
from steps.policy_config import DPO

REPOSITORY = Path(__file__).parents[2]
MINIMAL = "name: a\nmodel: {base: tiny}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def recipe(text: str) -> Recipe:
    return parse(read_yaml(text, "r.yaml"), "r.yaml")


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(text)
    return str(caught.value)


# -- what a recipe is --------------------------------------------------------------------------------------------


def test_every_recipe_of_the_repository_loads() -> None:
    found = sorted((REPOSITORY / "recipes").glob("*.yaml"))
    assert found
    for path in found:
        assert load(path).name


def test_a_recipe_needs_a_name_and_a_base_only() -> None:
    assert recipe(MINIMAL).model.base == "tiny"


def test_a_recipe_is_frozen() -> None:
    made = recipe(MINIMAL)
    for target, field in ((made, "seed"), (made.policy.dpo, "pairs"), (made.model.lora, "r")):
        with pytest.raises(ValidationError):
            setattr(target, field, 7)


def test_a_recipe_survives_being_written_down() -> None:
    made = recipe(MINIMAL + "policy: {dpo: {trainer: {learning_rate: 5e-7, loss_type: [sigmoid, sft]}}}")
    assert recipe(yaml.safe_dump(made.model_dump(mode="json"))) == made


def test_every_section_name_is_rebuilt_from_plain_values() -> None:
    for name, kind in SECTIONS.items():
        assert section(name, {}) == kind()
    assert section("dtype", "float32") == "float32"
    assert section("dpo", {"min_margin": 2}) == DPO(min_margin=2)


# -- several ways to be wrong ------------------------------------------------------------------------------------


def test_what_decides_no_verdict_is_in_no_key() -> None:
    llm = "llm: {base_url: http://localhost/v1, model: %s, price_per_million_input: 1, %s}"
    plain = "name: a\nmodel: {base: tiny}\nevaluate: {judge: llm, " + llm + "}\n"

    def key_of(model: str, more: str) -> object:
        return keyed("evaluate", recipe(plain % (model, more)).evaluate.model_dump(mode="json"))

    usual = key_of("m", "attempts: 4")
    for setting in ("budget: 3", "timeout: 5", "max_concurrent: 9", "attempts: 1", "key_variable: KEY"):
        assert key_of("m", setting) == usual, setting
    for model, setting in (("other", ""), ("m", "max_tokens: 99"), ("m", "instructions: be kind")):
        assert key_of(model, setting) != usual, setting


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_all_else_of_a_section_is_keyed(name: str) -> None:
    value = (recipe(MINIMAL).gate if name == "gate" else SECTIONS[name]()).model_dump(mode="json")
    assert keyed(name, value) == value
    assert keyed("dtype", "float32") == "float32"


def test_how_answers_are_drawn_does_not_depend_on_who_judges_them() -> None:
    one = recipe(MINIMAL + "evaluate: {judge: reward, confidence: 0.9, prompts: 7, temperatures: [0.1]}").evaluate
    two = recipe(MINIMAL + "evaluate: {judge: gold, rouge: true, prompts: 7, temperatures: [0.1]}").evaluate
    assert one.sampling == two.sampling
    assert one.sampling.prompts == 7
    assert one.sampling != recipe(MINIMAL + "evaluate: {temperature: 0.5, prompts: 7}").evaluate.sampling


def test_an_unknown_key_gets_its_dotted_path_and_a_suggestion() -> None:
    text = refusal(MINIMAL + "policy: {dpo: {min_margn: 1}}")
    assert "policy.dpo.min_margn: no such key, did you mean 'min_margin'?" in text
    assert "where r.yaml" in text
    assert "prefloop check r.yaml" in text


def test_an_unknown_key_deep_inside_is_compared_with_its_own_section() -> None:
    text = refusal("name: a\nmodel: {base: tiny, lora: {rnk: 4, alhpa: 8}}")
    assert "model.lora.alhpa: no such key, did you mean 'alpha'?" in text
    assert "model.lora.rnk: no such key" in text


def test_an_unknown_section_is_compared_with_the_sections() -> None:
    assert "polcy: no such key, did you mean 'policy'?" in refusal(MINIMAL + "polcy: {}")


def test_all_problems_come_in_one_error() -> None:
    text = refusal(
        "name: 'no spaces'\nseed: -1\nmodel: {lora: {r: 0}}\nsft: {trainer: {bta: 1}}\nevaluate: {prompts: many}\n"
    )
    assert text.startswith("6 problems in the recipe")
    for path in ("name:", "seed:", "model.base: missing", "model.lora.r:", "sft.trainer:", "evaluate.prompts:"):
        assert path in text


def test_one_problem_is_counted_in_the_singular() -> None:
    assert refusal("name: a").startswith("1 problem in the recipe")


def test_a_misspelt_trainer_field_gets_a_suggestion() -> None:
    text = refusal(MINIMAL + "sft: {trainer: {lerning_rate: 1e-3}}")
    assert "sft.trainer: lerning_rate: not a field of TRL's configuration, did you mean 'learning_rate'?" in text


def test_a_field_of_another_trainer_is_refused() -> None:
    assert "beta: not a field" in refusal(MINIMAL + "reward: {trainer: {beta: 0.1}}")
    assert recipe(MINIMAL + "policy: {dpo: {trainer: {beta: 0.1}}}").policy.dpo.trainer == {"beta": 0.1}


def test_a_trainer_field_that_prefloop_decides_is_refused_with_the_reason() -> None:
    text = refusal(MINIMAL + "policy: {dpo: {trainer: {output_dir: /tmp/x, seed: 3, bta: 1}}}")
    assert "output_dir: decided by prefloop (a step writes into its own artifact)" in text
    assert "seed: decided by prefloop (set the recipe's `seed`)" in text
    assert "did you mean 'beta'?" in text


@pytest.mark.parametrize("setting", ["use_cpu: false", "per_device_eval_batch_size: 3"])
def test_a_trainer_field_that_a_step_overrules_is_refused_too(setting: str) -> None:
    assert "decided by prefloop" in refusal(MINIMAL + f"policy: {{dpo: {{trainer: {{{setting}}}}}}}")


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("seed: 2147483648", "seed"),
        ("name: .hidden", "name"),
        ("name: a.partial", "name"),
        ("name: a/b", "name"),
        ("evaluate: {temperature: 0}", "evaluate.temperature"),
        ("evaluate: {temperature: .nan}", "evaluate.temperature"),
        ("evaluate: {confidence: 1}", "evaluate.confidence"),
        ("gate: {win_rate_floor: 1.01}", "gate.win_rate_floor"),
        ("policy: {method: pppo}", "policy.method"),
        ("launch: {launcher: cloud}", "launch.launcher"),
        ("sft: 3", "sft"),
    ],
)
def test_a_value_out_of_bounds_is_named_by_path(line: str, path: str) -> None:
    key = line.partition(":")[0]
    base = "\n".join(kept for kept in MINIMAL.splitlines() if not kept.startswith(f"{key}:"))
    assert f"{path}:" in refusal(f"{base}\n{line}\n")


def test_an_early_end_can_not_show_more_than_a_half() -> None:
    early = f"{MINIMAL}evaluate: {{stop_early: true}}\n"
    assert "evaluate.stop_early=false" in refusal(f"{early}gate: {{win_rate_floor: 0.6}}\n")
    assert recipe(f"{early}gate: {{win_rate_floor: 0.5}}\n").evaluate.stop_early


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "3"])
def test_a_recipe_that_is_no_mapping_is_refused(text: str) -> None:
    assert "a recipe is a mapping of sections" in refusal(text)


def test_keys_that_are_not_text_are_refused() -> None:
    assert "1 problem" in refusal(MINIMAL + "5: x\n")


# -- YAML --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["5e-7", "5E-7", "1e3", "+1e-2", "-2e5", "1.5e-3", ".5", "1.", "1.e4", "1_0e-2"])
def test_numbers_in_every_spelling_are_numbers(text: str) -> None:
    value = read_yaml(text, "r.yaml")
    assert isinstance(value, float)
    assert value == float(text.replace("_", ""))


@pytest.mark.parametrize("text", ["e7", "1e", "v1.2.3", "1.2.3", "5e-7x", "0123abc", "."])
def test_words_that_look_a_little_like_numbers_stay_words(text: str) -> None:
    assert read_yaml(text, "r.yaml") == text


def test_whole_numbers_stay_whole() -> None:
    assert isinstance(read_yaml("17", "r.yaml"), int)


def test_a_learning_rate_in_exponent_form_arrives_as_a_number() -> None:
    assert recipe(MINIMAL + "sft: {trainer: {learning_rate: 5e-7}}").sft.trainer["learning_rate"] == 5e-7


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "sft: {rows: 1, rows: 2}\n", "a: [{b: 1, b: 2}]"])
def test_a_key_that_stands_twice_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml("name: a\n" + text, "r.yaml")
    assert "stands twice" in str(caught.value)
    assert "where r.yaml, line " in str(caught.value)


def test_the_same_key_in_two_sections_is_fine() -> None:
    assert read_yaml("a: {rows: 1}\nb: {rows: 2}", "r.yaml") == {"a": {"rows": 1}, "b": {"rows": 2}}


@pytest.mark.parametrize(
    "text",
    [
        "name: [unclosed",
        "a: b: c",
        "\tname: a",
        "name: *nowhere",
        "name: !!python/object/apply:os.system ['true']",
        "name: \x00",
        "? [a, b]\n: 1",
        "? {a: 1}\n: 1",
        "name: 2024-99-99",
    ],
)
def test_text_that_is_not_readable_as_yaml_is_a_recipe_error_with_its_place(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(text, "r.yaml")
    assert "r.yaml" in str(caught.value)


# -- files and --set ---------------------------------------------------------------------------------------------


def test_a_missing_file_names_the_recipes_there_are(tmp_path: Path) -> None:
    written(tmp_path, MINIMAL)
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "recpe.yaml")
    text = str(caught.value)
    assert "cannot read the recipe" in text
    assert str(tmp_path / "recpe.yaml") in text
    assert "No such file" in text
    assert "did you mean" in text


def test_a_missing_file_in_a_missing_folder_says_where_recipes_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"known: recipes/|recipes stand in recipes/"):
        load(tmp_path / "nowhere" / "recipe.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load(tmp_path)


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(RecipeError, match="UTF-8"):
        load(tmp_path / "recipe.yaml")


def test_set_changes_adds_and_reads_values_as_yaml(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "seed: 1\n")
    made = load(
        path,
        [
            "seed=2",
            "model.lora.r=4",
            "policy.dpo.trainer.beta=5e-1",
            "policy.dpo.trainer.loss_type=[sigmoid, sft]",
            "sft.rows=null",
            "data.name=a=b",
        ],
    )
    assert made.seed == 2
    assert made.model.lora.r == 4
    assert made.policy.dpo.trainer == {"beta": 0.5, "loss_type": ["sigmoid", "sft"]}
    assert made.sft.rows is None
    assert made.data.name == "a=b"


def test_the_last_set_wins(tmp_path: Path) -> None:
    assert load(written(tmp_path, MINIMAL), ["seed=2", "seed=3"]).seed == 3


@pytest.mark.parametrize("assignment", ["seed", "=3", ""])
def test_set_without_key_or_value_is_refused(assignment: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        load(written(tmp_path, MINIMAL), [assignment])


def test_set_below_a_plain_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(written(tmp_path, MINIMAL + "seed: 1\n"), ["seed.deep=3"])
    assert "below a plain value" in str(caught.value)
    assert "seed = 1" in str(caught.value)


def test_set_of_an_unknown_key_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"policy\.dpo\.trainer: bta: .*did you mean 'beta'"):
        load(written(tmp_path, MINIMAL), ["policy.dpo.trainer.bta=1"])


def test_set_of_broken_yaml_names_the_assignment(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--set policy\.dpo\.pairs"):
        load(written(tmp_path, MINIMAL), ["policy.dpo.pairs=[1"])
