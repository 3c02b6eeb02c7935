"""Relatives of DPO by name: what they take from its section and what they do not, and how a comparison names them."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import tiny

from steps import pipeline
from steps.comparison import STRENGTH, failed, groups, variants
from steps.comparison_run import metric_name
from steps.config import Recipe, parse, read_yaml, section
from steps.errors import RecipeError
from steps.policy_config import RELATIVES, Policy
from steps.trainer_fields import REFERENCE_FREE, fields_of, owned_of


def recipe(method: str, **sections: Any) -> Recipe:
    tree = read_yaml(tiny.RECIPE, "tiny")
    tree["policy"] = {**tree["policy"], "method": method, **sections}
    return parse(tree, "tiny")


def trainer(method: str, own: dict[str, Any] | None = None, **dpo: Any) -> dict[str, Any]:
    """The trainer's settings a method comes to, from those of `policy.dpo` and its own."""
    return recipe(method, dpo={"trainer": dpo}, **({method: {"trainer": own}} if own else {})).policy.relative.trainer


@pytest.mark.parametrize("method", RELATIVES)
def test_pairs_and_training_are_dpos(method: str) -> None:
    dpo = {"pairs": 64, "min_margin": 1.5, "max_chars": 90, "held_out": 30}
    made = recipe(method, dpo={**dpo, "trainer": {"learning_rate": 2e-4, "max_steps": 5}}).policy.relative
    assert {name: getattr(made, name) for name in dpo} == dpo
    assert (made.trainer["learning_rate"], made.trainer["max_steps"]) == (2e-4, 5)
    assert trainer(method, {"learning_rate": 1e-5}, learning_rate=2e-4)["learning_rate"] == 1e-5


@pytest.mark.parametrize("method", RELATIVES)
def test_what_is_of_dpos_loss_stays_with_dpo(method: str) -> None:
    loss = {"loss_type": ["aot"], "label_smoothing": 0.3, "ld_alpha": 0.5, "f_divergence_type": "js_divergence"}
    made = trainer(method, **loss, discopop_tau=0.1, use_weighting=True, precompute_ref_log_probs=False)
    for name in ("ld_alpha", "f_divergence_type", "use_weighting"):
        assert name not in made
    assert made.get("loss_type") in (None, ["ipo"], ["robust"], ["hinge"])
    assert made.get("label_smoothing") in (None, 0.1)
    if method in (*REFERENCE_FREE, "cdpo", "kto"):  # the pass comes first, whatever dpo does
        assert "precompute_ref_log_probs" not in made


def test_beta_is_a_methods_own_and_of_one_without_a_reference_the_scale_of_its_report() -> None:
    for method in RELATIVES:
        assert trainer(method, beta=0.3).get("beta") == (0.3 if method in REFERENCE_FREE else None)
    assert trainer("ipo", {"beta": 0.5}, beta=0.3)["beta"] == 0.5
    assert recipe("simpo", dpo={"trainer": {"beta": 0.3}}).policy.relative.loss == {"beta": 2.0, "simpo_gamma": 1.0}


@pytest.mark.parametrize("method", RELATIVES)
def test_what_a_method_comes_to_is_what_its_trainer_takes(method: str) -> None:
    every = dict.fromkeys(fields_of("dpo") - set(owned_of("dpo")) - {"loss_type", "label_smoothing"}, 1)
    made = trainer(method, **every)
    assert set(made) <= fields_of(method)
    assert set(made) & set(owned_of(method)) - {"loss_type", "beta"} == set()


def test_a_pair_is_two_rows_of_kto_so_that_a_batch_holds_the_same_pairs() -> None:
    assert trainer("kto", per_device_train_batch_size=12)["per_device_train_batch_size"] == 24
    assert trainer("kto")["per_device_train_batch_size"] == 16
    made = trainer("kto", {"per_device_train_batch_size": 6}, per_device_train_batch_size=12)
    assert made["per_device_train_batch_size"] == 6


@pytest.mark.parametrize(
    ("method", "own", "why"),
    [
        ("ipo", {"loss_type": ["sigmoid"]}, "the method is its loss"),
        ("ipo", {"label_smoothing": 0.1}, "the loss has none"),
        ("orpo", {"beta": 0.2}, "the loss's own stands beside `trainer`"),
        ("cdpo", {"precompute_ref_log_probs": False}, "the reference is asked once"),
        ("cdpo", {"label_smoothing": 0.5}, "from 0 to below 0.5"),
        ("robust", {"label_smoothing": 0.5}, "from 0 to below 0.5"),
        ("kto", {"eval_strategy": "steps"}, "measured at the end"),
        ("kto", {"desirable_weigth": 2}, "did you mean 'desirable_weight'"),
        ("dpo", {"loss_type": ["sigmoid", "apo_zer"]}, "did you mean 'apo_zero'"),
        ("dpo", {"loss_type": "simpo"}, "TRL has no 'simpo'"),
        ("dpo", {"label_smoothing": 0.1}, "or set method: cdpo"),
        ("dpo", {"loss_type": ["sigmoid", "nca_pair"], "label_smoothing": 0.1}, "only aot, aot_unpaired"),
        ("dpo", {"train_sampling_strategy": "sequential"}, "batches are of like length"),
        ("simpo", {"train_sampling_strategy": "sequential"}, "batches are of like length"),
        ("rloo", {"top_p": 0.9}, "drawn from the whole distribution"),
        ("grpo", {"generation_kwargs": {"top_k": 5}}, "drawn by `steps.sampling`"),
        ("spo", {"shuffle_dataset": False}, "an order drawn from the seed"),
        ("ppo", {"disable_dropout": False}, "nothing is dropped out"),
    ],
)
def test_a_setting_that_would_do_nothing_or_something_else_is_refused(
    method: str, own: dict[str, Any], why: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe(method, **{method: {"trainer": own}})
    assert why in str(refused.value)


def test_every_method_has_a_step_a_section_and_a_strength() -> None:
    methods = set(get_args(Policy.model_fields["method"].annotation))
    tuned = methods - {"sft"}  # which has nothing to set, and a win rate against the base, so no place in a comparison
    assert methods == set(pipeline.POLICIES) and tuned == set(STRENGTH)
    assert set(RELATIVES) <= tuned <= set(Policy.model_fields)


@pytest.mark.parametrize("method", RELATIVES)
def test_a_step_gets_the_settings_it_comes_to_and_no_others(method: str) -> None:
    step = pipeline.POLICIES[method]
    settings = {name: pipeline._at(recipe(method), path) for name, path in step.config.items()}
    assert section("relative", settings["relative"]) == recipe(method).policy.relative
    assert (settings["method"], settings["dtype"]) == (method, "float32")
    other = recipe(method, ppo={"rollouts": 3}).policy.relative
    assert other == recipe(method).policy.relative


def test_a_used_recipe_holds_dpos_section_beside_a_relatives() -> None:
    assert list(recipe("orpo").used()["policy"]) == ["method", "start", "dpo", "orpo"]
    assert list(recipe("ppo").used()["policy"]) == ["method", "start", "ppo"]
    assert parse(recipe("orpo").used(), "again").policy.relative == recipe("orpo").policy.relative


# -- in a comparison ---------------------------------------------------------------------------------------------


def test_strengths_all_share_pass_methods_on_their_own_scale_by() -> None:
    named = ["dpo", "ipo", "kto@0.5", "simpo", "orpo@0.2", "slic", "slic-sample-rank@1"]
    planned = variants(recipe("dpo"), named, [0.1, 0.3], 1)
    assert [(variant.method, variant.setting) for variant in planned] == [
        ("dpo", "β=0.1"),
        ("dpo", "β=0.3"),
        ("ipo", "β=0.1"),
        ("ipo", "β=0.3"),
        ("kto", "β=0.5"),
        ("simpo", "β=2"),
        ("orpo", "β=0.2"),
        ("slic", "λ=0.1"),
        ("slic_sample_rank", "λ=1"),
    ]
    assert planned[4].recipe.policy.relative.trainer["beta"] == 0.5
    assert planned[6].recipe.policy.relative.loss["beta"] == 0.2
    assert planned[8].recipe.policy.relative.loss["lam"] == 1


def test_dpo_by_another_loss_or_a_sum_is_a_variant_of_its_own() -> None:
    one, two = variants(recipe("dpo"), ["dpo:apo_zero@1e-1", "dpo:sigmoid+sft"], [0.3], 1)
    assert (one.name, one.beta, one.recipe.policy.dpo.trainer["loss_type"]) == (
        "dpo:apo_zero β=0.1 seed 3",
        0.1,
        ["apo_zero"],
    )
    assert two.recipe.policy.dpo.trainer["loss_type"] == ["sigmoid", "sft"]
    with pytest.raises(RecipeError, match="only dpo takes another loss"):
        variants(recipe("dpo"), ["ipo:aot"], [0.1], 1)
    with pytest.raises(RecipeError, match="TRL has no 'apo'"):
        variants(recipe("dpo"), ["dpo:apo"], [0.1], 1)


def test_metrics_have_names_mlflow_takes() -> None:
    from mlflow.utils.validation import _validate_metric_name

    named = ["dpo:sigmoid+sft", "slic", "slic-sample-rank", "best-of-n"]
    found = groups([failed(variant, "failed") for variant in variants(recipe("dpo"), named, [0.1], 1)], {})
    names = [metric_name(group) for group in found]
    assert names == [
        "dpo sigmoid and sft/beta 0.1",
        "slic/lambda 0.1",
        "slic_sample_rank/lambda 0.1",
        "best_of_n/plain",
    ]
    for name in names:
        _validate_metric_name(f"{name}/gold")
