"""Judges: who says which of two answers is better. A judge's word counts once it agrees with people."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline, make_union

from steps.statistics import pair_accuracy


class GoldJudge:
    """Ridge regression of people's mean ratings on words and character n-grams.

    Fitted anew from the `gold` table whenever it is needed (seconds, the same numbers every time), so that no fitted
    object has to be stored. Deliberately unlike the models it judges: it shares neither weights nor data with them.
    """

    def __init__(self, answers: Sequence[str], scores: Sequence[float]) -> None:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True)
        self._model = make_pipeline(make_union(words, characters), Ridge(alpha=1.0, solver="sparse_cg", tol=1e-6))
        self._model.fit(list(answers), np.asarray(scores, float))

    def score(self, answers: Sequence[str]) -> np.ndarray:
        """(n,) ratings on the scale of the people it was fitted to."""
        return self._model.predict(list(answers))

    def accuracy(self, pairs: pd.DataFrame) -> float:
        """Share of human pairs (chosen, rejected) it orders as people did."""
        return pair_accuracy(self.score(list(pairs["chosen"])), self.score(list(pairs["rejected"])))
