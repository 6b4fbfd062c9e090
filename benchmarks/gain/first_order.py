"""The strongest classifier of first-order statistics that cross-validation finds, to compare the default head with.

Six kinds of classifiers, all their constants chosen on the training images: ridge regression, logistic
regression, linear and Gaussian support vector machines, a shrunk linear discriminant, nearest neighbors.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

FOLDS = 5
# What the arms read: averages, or all first-order statistics of three maps
FIRST_ORDER: Mapping[str, tuple[str, ...]] = {
    "averages, best of six classifiers": ("own",),
    "averages and deviations of three maps, best of six classifiers": (
        "own",
        "mean",
        "deviation",
    ),
}
CLASSIFIERS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "ridge": (RidgeClassifier(), {"alpha": [10.0**n for n in range(1, 6)]}),
    "logistic": (LogisticRegression(max_iter=300), {"C": [10.0**n for n in range(-5, 0)]}),
    "linear SVM": (LinearSVC(max_iter=2000), {"C": [10.0**n for n in range(-6, -1)]}),
    "Gaussian SVM": (
        SVC(),
        {"C": [1.0, 10.0, 100.0], "gamma": [1e-4, 3e-4, 1e-3]},
    ),
    "discriminant": (
        LinearDiscriminantAnalysis(solver="lsqr"),
        {"shrinkage": [0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9]},
    ),
    "neighbors": (KNeighborsClassifier(metric="cosine"), {"n_neighbors": [1, 3, 5, 9]}),
}


def best_answers(
    train: NDArray[np.float32],
    targets: NDArray[np.int64],
    test: NDArray[np.float32],
    seed: int = 0,
) -> tuple[str, NDArray[np.int64]]:
    """Choose the classifier of *train* (N, D) by cross-validation; return its name and its classes of *test* (n,)."""
    # The coordinates in the span of the training vectors: equal products, fewer numbers.
    scaler = StandardScaler().fit(train)
    scaled = scaler.transform(train)
    _, _, basis = np.linalg.svd(scaled, full_matrices=False)
    reduced = scaled @ basis.T

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    searches = {}
    for name, (classifier, constants) in CLASSIFIERS.items():
        search = GridSearchCV(classifier, constants, cv=folds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            searches[name] = search.fit(reduced, targets)
    best = max(searches, key=lambda name: searches[name].best_score_)
    predicted: NDArray[np.int64] = searches[best].predict(scaler.transform(test) @ basis.T)
    return best, predicted
