"""One site's training: logistic regression on its own rows. It knows nothing of encryption."""

import zlib

import numpy as np
import nvflare.client as flare
from numpy.typing import NDArray

Floats = NDArray[np.float32]
FEATURES, ROWS, STEPS, RATE = 8, 200, 20, 0.5
TRUTH = np.linspace(-1, 1, FEATURES)


def data_of(site: str) -> tuple[Floats, Floats]:
    """Rows that only this site has."""
    random = np.random.default_rng(zlib.crc32(site.encode()))
    rows = random.normal(size=(ROWS, FEATURES)).astype(np.float32)
    return rows, (rows @ TRUTH + random.normal(size=ROWS) / 4 > 0).astype(np.float32)


def trained(weights: Floats, rows: Floats, labels: Floats) -> Floats:
    """The weights after a few steps of gradient descent."""
    for _ in range(STEPS):
        chances = 1 / (1 + np.exp(-rows @ weights))
        weights = weights - RATE * rows.T @ (chances - labels) / len(rows)
    return weights.astype(np.float32)


flare.init()
rows, labels = data_of(flare.get_site_name())
while flare.is_running():
    model = flare.receive()
    weights = trained(model.params["numpy_key"], rows, labels)
    right = float(np.mean((rows @ weights > 0) == labels))
    flare.send(
        flare.FLModel(
            params={"numpy_key": weights},
            metrics={"accuracy": right},  # stays here
            meta={"NUM_STEPS_CURRENT_ROUND": STEPS},
        )
    )
