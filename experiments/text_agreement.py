"""Judges generated pictures by the features of an EfficientNet-Lite0: do they show what their captions ask for, and
how far are they from real ones?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusers_pq.files import replacing
from diffusers_pq.images import to_tensor, to_uint8
from diffusers_pq.metrics import load_fd_efficientnet_lite0


BATCH_SIZE = 64
# Of 10, 100, 1,000 and 10,000, for which held-out pictures' subjects are named most often; features are standardised.
RIDGE = 100.0


def picture_features(pictures: Sequence[Image.Image]) -> np.ndarray:
    """`[N, 1280]`, float32."""
    network = load_fd_efficientnet_lite0().inception
    batches = []
    with torch.inference_mode():
        for start in range(0, len(pictures), BATCH_SIZE):
            batch = [to_uint8(to_tensor(picture)) for picture in pictures[start : start + BATCH_SIZE]]
            batches.append(network(torch.stack(batch)).float())
    return torch.cat(batches).numpy()


def frechet_distance(features: np.ndarray, references: np.ndarray) -> float:
    """Between two sets of [`picture_features`]."""
    as_they_are = nn.Identity()
    as_they_are.num_features = features.shape[1]
    metric = FrechetInceptionDistance(as_they_are)
    metric.update(torch.from_numpy(references), real=True)
    metric.update(torch.from_numpy(features), real=False)
    return float(metric.compute())


@dataclass
class TextAgreement:
    """
    Classifiers of what captions name.

    Args:
        classifiers (`dict[str, Pipeline]`): By the column that they predict, such as `subject`.
    """

    classifiers: dict[str, Pipeline]

    @classmethod
    def fit(cls, features: np.ndarray, columns: dict[str, Sequence[str]]) -> "TextAgreement":
        classifiers = {}
        for name, values in columns.items():
            classifiers[name] = make_pipeline(StandardScaler(), RidgeClassifier(RIDGE)).fit(features, values)
        return cls(classifiers)

    def accuracy(self, features: np.ndarray, columns: dict[str, Sequence[str]]) -> dict[str, float]:
        """Of each column, the share of pictures whose value the classifier names, and names among its first five."""
        shares = {}
        for name, classifier in self.classifiers.items():
            order = np.argsort(-classifier.decision_function(features), axis=1)
            named = classifier.classes_[order] == np.asarray(columns[name])[:, None]
            shares[name] = float(named[:, 0].mean())
            shares[f"{name}_top5"] = float(named[:, :5].any(axis=1).mean())
        return shares


def cached_features(pictures: Sequence[Image.Image], path: Path) -> np.ndarray:
    """Those of a file, which is written where it is missing."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, open(unfinished, "wb") as file:
            np.save(file, picture_features(pictures))
    return np.load(path)
