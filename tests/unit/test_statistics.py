"""Statistics against closed formulas, symmetries and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, norm, t

from steps.intervals import (
    _least_difference,
    bootstrap_interval,
    cluster_interval,
    normal_interval,
    score_interval,
    standard_error,
    wilson,
)
from steps.statistics import (
    best_of_n_kl,
    distinct,
    few_groups,
    holm,
    pair_accuracy,
    pooled,
    published_preferences,
    repetition,
    rouge,
    sign_test,
    win_rate,
    win_rate_by,
)

SCORES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=60)


@pytest.mark.parametrize(("k", "n", "confidence"), [(7, 10, 0.95), (0, 20, 0.95), (20, 20, 0.99), (2.5, 9, 0.9)])
def test_wilson_is_the_closed_formula(k: float, n: int, confidence: float) -> None:
    """Wilson 1927: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)."""
    z, p = norm.ppf((1 + confidence) / 2), k / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert wilson(k, n, confidence) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_wilson_holds_the_rate_and_stays_inside_zero_and_one(case: tuple[int, int]) -> None:
    twice, n = case
    low, high = wilson(twice / 2, n)
    assert 0 <= low <= high <= 1
    assert low - 1e-12 <= twice / 2 / n <= high + 1e-12


def test_wilson_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)


def test_wilson_covers_as_often_as_it_says() -> None:
    """Exact coverage at n = 200, p = 0.7 is 0.947; 2000 draws have a standard error of 0.005."""
    successes = np.random.default_rng(0).binomial(200, 0.7, size=2000)
    bounds = {k: wilson(k, 200) for k in set(successes.tolist())}
    covered = np.mean([bounds[k][0] <= 0.7 <= bounds[k][1] for k in successes.tolist()])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(("wins", "losses"), [(1, 0), (0, 50), (50, 0)])
def test_the_score_interval_of_verdicts_that_all_agree_is_wilsons(wins: int, losses: int) -> None:
    assert score_interval(wins, 0, losses) == wilson(wins, wins + losses)


@pytest.mark.parametrize(("wins", "losses"), [(35, 15), (1, 49), (25, 25)])
def test_the_score_interval_without_ties_is_wilsons(wins: int, losses: int) -> None:
    """Also by way of the root that ties need."""
    n = wins + losses
    assert score_interval(wins, 0, losses) == wilson(wins, n)
    z = norm.ppf(0.975)
    rooted = [(1 + _least_difference(wins, losses, n, z)) / 2, (1 - _least_difference(losses, wins, n, z)) / 2]
    assert rooted == pytest.approx(wilson(wins, n), abs=1e-9)


def test_the_score_interval_is_the_one_of_a_published_implementation() -> None:
    """R's PropCIs: scoreci.mp(25, 28, 618, 0.9) is −0.0148 to 0.0247, as differences of proportions."""
    low, high = score_interval(28, 565, 25, confidence=0.9)
    assert (2 * low - 1, 2 * high - 1) == pytest.approx((-0.0148, 0.0247), abs=5e-5)


def test_the_score_interval_of_ties_alone_by_hand() -> None:
    """θ is P(win) − P(loss) and, with no loss likeliest, P(win) = θ: nθ² = z² (θ − θ²) gives θ = z² / (n + z²)."""
    theta = norm.ppf(0.975) ** 2 / (40 + norm.ppf(0.975) ** 2)
    assert score_interval(0, 40, 0) == pytest.approx(((1 - theta) / 2, (1 + theta) / 2))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_the_score_interval_holds_the_rate_and_turns_round_with_the_sides(wins: int, ties: int, losses: int) -> None:
    n = wins + ties + losses
    if n:
        low, high = score_interval(wins, ties, losses)
        assert 0 <= low <= high <= 1
        assert low - 1e-12 <= (wins + ties / 2) / n <= high + 1e-12
        assert score_interval(losses, ties, wins) == pytest.approx((1 - high, 1 - low))


def test_ties_narrow_the_interval() -> None:
    """The variance of a verdict at rate ½ is (1 − ties) / 4, so at 40 % ties widths go by √0.6."""
    (low, high), (least, most) = score_interval(300, 400, 300), wilson(500, 1000)
    assert (high - low) / (most - least) == pytest.approx(math.sqrt(0.6), rel=0.005)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_a_model_against_itself_ties_everywhere(scores: list[float]) -> None:
    found = win_rate(scores, scores)
    assert (found.wins, found.ties, found.losses, found.n) == (0, len(scores), 0, len(scores))
    assert found.rate == 0.5
    assert found.p_value == 1
    assert found.low + found.high == pytest.approx(1)


@given(SCORES)
def test_changing_places_turns_wins_into_losses(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    one, two = win_rate(first, second), win_rate(second, first)
    assert (one.wins, one.ties, one.losses) == (two.losses, two.ties, two.wins)
    assert one.rate == pytest.approx(1 - two.rate)
    assert (one.low, one.high) == pytest.approx((1 - two.high, 1 - two.low))
    assert one.p_value == pytest.approx(two.p_value)


@given(SCORES)
def test_wins_ties_and_losses_are_all_there_is(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = win_rate(first, second)
    assert found.n == len(pairs)
    assert found.rate == pytest.approx((found.wins + found.ties / 2) / found.n)
    assert found.rate == pytest.approx(pair_accuracy(first, second))


def test_the_sign_test_of_five_to_nothing() -> None:
    """Two-sided: 2 · (1/2)^5 = 1/16."""
    assert win_rate([1] * 5, [0] * 5).p_value == pytest.approx(1 / 16)


def test_the_sign_test_of_four_to_one() -> None:
    """Two-sided: 2 · (C(5,0) + C(5,1)) / 2^5 = 12/32."""
    assert win_rate([1, 1, 1, 1, 0], [0, 0, 0, 0, 1]).p_value == pytest.approx(12 / 32)


def test_ties_say_nothing_in_the_sign_test() -> None:
    assert win_rate([1] * 5 + [0] * 50, [0] * 55).p_value == pytest.approx(1 / 16)


def test_a_difference_within_the_tie_width_is_a_tie() -> None:
    found = win_rate([0.5, 0.51, 0.0], [0.0, 0.0, 0.51], tie_width=0.5)
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)


def test_more_confidence_is_a_wider_interval() -> None:
    narrow, wide = (win_rate([1, 1, 0], [0, 0, 1], confidence) for confidence in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("scores", "against"),
    [([], []), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1]), ([[1], [2]], [[1], [2]]), ([math.nan], [1]), ([math.inf], [1])],
)
def test_scores_that_cannot_be_compared_are_refused(scores: list, against: list) -> None:
    with pytest.raises(ValueError):
        win_rate(scores, against)


def test_pair_accuracy_counts_a_tie_as_half() -> None:
    assert pair_accuracy([1, 0, 1, 5], [0, 1, 1, 5]) == 0.5
    assert pair_accuracy([2, 2], [1, 2]) == 0.75
    assert pair_accuracy([1], [0]) == 1
    assert pair_accuracy([0], [1]) == 0


def test_distinct_counts_different_ngrams_over_all() -> None:
    """`a b a b` has the bigrams ab, ba, ab: two of three differ; its words: two of four."""
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b a b"], 1) == pytest.approx(2 / 4)


def test_distinct_is_over_all_texts_and_never_across_two() -> None:
    assert distinct(["a b", "a b"], 2) == 0.5
    assert distinct(["a b", "b a"], 2) == 1
    assert distinct(["a", "b"], 2) == 0
    assert distinct([], 2) == 0


# What AlpacaEval's leaderboard of discrete verdicts (text_davinci_003 as baseline, GPT-4 as judge) prints: wins of the
# model, wins of the baseline, draws, win_rate, standard_error.
PUBLISHED = [
    ("gpt4_turbo", 783, 16, 5, 97.69900497512438, 0.5104849118311993),
    ("tulu-2-dpo-70b", 764, 39, 2, 95.03105590062113, 0.7613100978662208),
    ("Yi-34B-Chat", 754, 46, 3, 94.08468244084682, 0.8260116588728516),
    ("evo-7b", 632, 163, 8, 79.20298879202988, 1.4222487749194896),
    ("minichat-3b", 390, 409, 5, 48.818407960199, 1.758472313521605),
    ("phi-2", 234, 543, 22, 30.663329161451813, 1.6056202651534168),
    ("text_davinci_003", 0, 0, 805, 50.0, 0.0),
]


@pytest.mark.parametrize(("name", "wins", "losses", "ties", "rate", "error"), PUBLISHED)
def test_published_figures_come_out(name: str, wins: int, losses: int, ties: int, rate: float, error: float) -> None:
    old, new = ties // 2, ties - ties // 2
    preferences = published_preferences([2] * wins + [1] * losses + [0] * old + [1.5] * new + [math.nan, None])
    assert len(preferences) == wins + losses + ties
    assert 100 * preferences.mean() == pytest.approx(rate, abs=1e-9)
    assert 100 * standard_error(preferences) == pytest.approx(error, abs=1e-9)


def test_published_verdicts_may_be_probabilities() -> None:
    assert published_preferences([1.0, 1.25, 1.5, 2.0]).tolist() == [0, 0.25, 0.5, 1]


@pytest.mark.parametrize("strange", [-1, 0.5, 2.5, math.inf])
def test_a_published_verdict_outside_its_coding_is_refused(strange: float) -> None:
    with pytest.raises(ValueError, match="lie in"):
        published_preferences([1, 2, strange])


def test_the_standard_error_of_coins_is_the_textbook_one() -> None:
    """Σ(x − ½)² = n / 4, so s² / n = 1 / (4 (n − 1))."""
    assert standard_error([0, 1] * 50) == pytest.approx(math.sqrt(1 / (4 * 99)))
    assert math.isnan(standard_error([1]))


def test_the_normal_interval_is_symmetric_about_the_mean() -> None:
    low, high = normal_interval([1, 1, 0, 0.5, 1], 0.95)
    assert (low + high) / 2 == pytest.approx(0.7)
    assert (high - low) / 2 == pytest.approx(norm.ppf(0.975) * standard_error([1, 1, 0, 0.5, 1]))


@pytest.mark.parametrize("wrong", [[], [math.nan], [1.2], [-0.1], [[1, 0]]])
def test_preferences_that_are_none_are_refused(wrong: list) -> None:
    for interval in (standard_error, normal_interval, bootstrap_interval):
        with pytest.raises(ValueError):
            interval(wrong)


PREFERENCES = st.lists(st.sampled_from([0, 0.5, 1]), min_size=2, max_size=40)


def test_one_verdict_a_cluster_is_the_t_interval() -> None:
    verdicts = [1, 0, 1, 1, 0.5, 0, 1, 1]
    half = t.ppf(0.95, 7) * standard_error(verdicts)
    mean = np.mean(verdicts)
    assert cluster_interval(verdicts, list("abcdefgh"), 0.9) == pytest.approx((mean - half, mean + half))


def test_a_cluster_interval_is_the_closed_formula() -> None:
    """Variance G / (G − 1) · Σ_g (Σ_i e_gi)² / n²: sums of residuals −1, 1, 0 over n = 6, so 3/2 · 2 / 36 = 1/12."""
    verdicts, clusters = [0, 0, 1, 1, 0, 1], ["a", "a", "b", "b", "c", "c"]
    half = t.ppf(0.975, 2) * math.sqrt(1 / 12)
    assert cluster_interval(verdicts, clusters) == pytest.approx((0.5 - half, 0.5 + half))


def test_saying_everything_twice_adds_nothing() -> None:
    """To repeat each verdict on its own prompt leaves a clustered interval alone, and shrinks one that is not."""
    verdicts = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    ids = list(range(60))
    twice = np.concatenate([verdicts, verdicts])
    assert cluster_interval(twice, ids * 2) == pytest.approx(cluster_interval(verdicts, ids))
    for method in ("bca", "percentile"):
        once = bootstrap_interval(verdicts, ids, method=method)
        assert bootstrap_interval(twice, ids * 2, method=method) == pytest.approx(once)
    low, high = bootstrap_interval(twice)
    assert high - low < 0.8 * (once[1] - once[0])


def test_clusters_need_two_and_one_for_each_verdict() -> None:
    with pytest.raises(ValueError, match="two clusters"):
        cluster_interval([1, 0], ["a", "a"])
    for interval in (cluster_interval, bootstrap_interval):
        with pytest.raises(ValueError, match="1 clusters for 2"):
            interval([1, 0], ["a"])


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_the_bootstrap_agrees_with_the_normal_interval_where_that_is_right(method: str) -> None:
    verdicts = np.random.default_rng(1).choice([0, 0.5, 1], 800, p=[0.3, 0.2, 0.5])
    assert bootstrap_interval(verdicts, method=method) == pytest.approx(normal_interval(verdicts), abs=0.003)


def test_bca_is_what_scipy_has() -> None:
    verdicts = np.random.default_rng(2).choice([0, 0.25, 1], 40, p=[0.1, 0.1, 0.8])
    theirs = bootstrap((verdicts,), np.mean, n_resamples=20_000, method="BCa", rng=1).confidence_interval
    assert bootstrap_interval(verdicts, resamples=20_000) == pytest.approx((theirs.low, theirs.high), abs=0.01)


@given(PREFERENCES, st.sampled_from(["bca", "percentile"]))
def test_a_bootstrap_stays_inside_zero_and_one_and_repeats(verdicts: list[float], method: str) -> None:
    low, high = bootstrap_interval(verdicts, resamples=200, method=method)
    assert 0 <= low <= high <= 1
    assert (low, high) == bootstrap_interval(verdicts, resamples=200, method=method)


def test_a_bootstrap_in_chunks_is_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = np.random.default_rng(3).integers(0, 2, 50).astype(float)
    whole = bootstrap_interval(verdicts, resamples=999)
    monkeypatch.setattr("steps.intervals.CHUNK", 500)
    assert bootstrap_interval(verdicts, resamples=999) == pytest.approx(whole, abs=1e-12)


def test_prompts_that_all_say_the_same_leave_the_bootstrap_no_width() -> None:
    assert bootstrap_interval([1, 1, 1]) == (1, 1)
    assert bootstrap_interval([1, 0, 1, 0], ["a", "a", "b", "b"]) == (0.5, 0.5)


def test_the_sign_test_by_hand() -> None:
    assert sign_test(5, 0) == pytest.approx(1 / 16)
    assert sign_test(0, 0) == 1
    assert sign_test(3, 8) == sign_test(8, 3)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, 0.04; none may be below the one before it."""
    assert holm([0.04, 0.01, 0.03]).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]).tolist() == []
    assert holm([0.2]).tolist() == [0.2]


@pytest.mark.parametrize("seed", range(3))
def test_holm_keeps_the_family_wise_error(seed: int) -> None:
    """The smallest of m is held against α / m (Bonferroni), and no p-value becomes smaller or changes its rank."""
    given = np.random.default_rng(seed).random(6)
    adjusted = holm(given)
    assert adjusted.min() == pytest.approx(min(1, 6 * given.min()))
    assert (adjusted >= given).all()
    assert (np.diff(adjusted[np.argsort(given)]) >= 0).all()


@pytest.mark.parametrize("wrong", [[1.1], [-0.1], [math.nan]])
def test_what_is_no_p_value_is_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="p-values"):
        holm(wrong)


def test_groups_part_the_prompts() -> None:
    found = win_rate_by(["film", "cook", "film", None], [1, 0.5, 0, 0.9])
    assert list(found) == ["film", "cook", None]
    assert (found["film"].wins, found["film"].losses, found["cook"].ties, found[None].wins) == (1, 1, 1, 1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0, 0.5, 1])), min_size=1, max_size=40))
def test_groups_hold_every_prompt_once(cases: list[tuple[str, float]]) -> None:
    groups, preferences = zip(*cases, strict=True)
    found = win_rate_by(groups, preferences)
    whole = win_rate(preferences, [0.5] * len(preferences))
    assert sum(group.n for group in found.values()) == whole.n
    assert sum(group.rate * group.n for group in found.values()) / whole.n == pytest.approx(whole.rate)


def test_few_groups_by_hand() -> None:
    labels = ["a"] * 12 + ["b"] * 10 + ["c"] * 9 + [None, float("nan")]
    assert few_groups(labels) == ["a"] * 12 + ["b"] * 10 + ["other"] * 11
    assert few_groups(["a"] * 12 + ["b"] * 10) == ["a"] * 12 + ["b"] * 10
    assert few_groups([]) == []


@given(st.lists(st.sampled_from([*"abcdefgh", None, "other"]), max_size=80), st.integers(1, 12), st.integers(2, 5))
def test_groups_are_few_and_large_whatever_the_labels(labels: list, least: int, most: int) -> None:
    groups = few_groups(labels, least, most)
    assert len(set(groups)) <= most
    assert all(group in (label, "other") for group, label in zip(groups, labels, strict=True))
    for group in set(groups) - {"other"}:
        assert groups.count(group) == labels.count(group) >= least
    kept, pooled_away = set(groups) - {"other"}, set(labels) - set(groups) - {None, "other"}
    assert max(map(labels.count, pooled_away), default=0) <= min(map(labels.count, kept), default=len(labels))


def test_groups_may_be_tuples_and_must_fit() -> None:
    assert list(win_rate_by([("a", 1), ("a", 2)], [1, 0])) == [("a", 1), ("a", 2)]
    with pytest.raises(ValueError, match="1 labels for 2"):
        win_rate_by(["a"], [1, 0])


def test_pooling_counts_failures_apart() -> None:
    found = pooled({0: [1, 1, 0, 1], 1: None, 2: [0, 1, 0, 0]})
    assert (found.seeds, found.failed, found.better) == (3, 1, 1)
    assert found.rate == pytest.approx(0.5)
    assert found.spread == pytest.approx(math.sqrt(0.125))
    assert found.by_seed[0] == 0.75
    assert math.isnan(found.by_seed[1])


def test_a_seed_that_repeats_another_narrows_nothing() -> None:
    """Answers to the same prompts are no new prompts."""
    verdicts = [1, 1, 0, 1, 0.5, 1, 0, 1]
    one, three = pooled({0: verdicts}), pooled({0: verdicts, 1: verdicts, 2: verdicts})
    assert (one.low, one.high) == pytest.approx((three.low, three.high))
    assert math.isnan(one.spread)
    assert three.spread == pytest.approx(0)


def test_pooled_prompts_may_come_twice() -> None:
    found = pooled({0: [1, 1, 0, 0, 1, 0]}, ["a", "a", "b", "b", "c", "c"])
    assert (found.low, found.high) == cluster_interval([1, 1, 0, 0, 1, 0], ["a", "a", "b", "b", "c", "c"])


@pytest.mark.parametrize(
    ("seeds", "said"), [({0: None}, "no seed"), ({}, "no seed"), ({0: [1, 0], 1: [1]}, "different")]
)
def test_seeds_that_cannot_be_pooled_are_refused(seeds: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pooled(seeds)


def test_best_of_n_is_an_upper_bound_on_the_true_divergence() -> None:
    """Over k equally likely answers of different rewards, P(best of n is the i-th) = (i/k)^n − ((i−1)/k)^n; the
    bound is reached as k grows."""
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    for k in (2, 10, 10_000):
        edges = np.arange(k + 1) / k
        best = np.diff(edges**4)
        divergence = float((best * np.log(best * k)).sum())
        assert divergence <= best_of_n_kl(4) + 1e-12
    assert divergence == pytest.approx(best_of_n_kl(4), abs=1e-3)
    with pytest.raises(ValueError):
        best_of_n_kl(0)


def test_repetition_by_hand() -> None:
    """`a b a b a` has the bigrams ab, ba, ab, ba: half of them were there before. Short texts do not count."""
    assert repetition(["a b a b a"], 2) == 0.5
    assert repetition(["a b a b a", "c d e", "x"], 2) == 0.25
    assert repetition(["a", ""], 2) == 0
    assert repetition(["a b", "a b"], 2) == 0, "what another text said is no repetition"


def test_repetition_and_distinct_of_one_text_add_up_to_one() -> None:
    text = "the film the film is good the film is long"
    assert repetition([text], 2) + distinct([text], 2) == pytest.approx(1)


def test_rouge_by_hand() -> None:
    """Four words against three, three of them shared: P = 3/4, R = 1. Bigrams: two shared of three and two."""
    pytest.importorskip("rouge_score")
    found = rouge(["The cat sat down"], ["the cat sat"])
    assert found == pytest.approx({"rouge1": 6 / 7, "rouge2": 4 / 5, "rougeL": 6 / 7})
    assert rouge(["a b", "c"], ["a b", "d"]) == pytest.approx({"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5})
    with pytest.raises(ValueError, match="same length"):
        rouge(["a"], [])
