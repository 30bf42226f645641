"""FedAvg in a loop of one's own, in the clear."""

import numpy as np
from training import accuracy, load, silos, train, weights

current = weights()
for round_number in range(1, 6):
    updates = [train(current, data) for data in silos]
    mean = {name: np.mean([each[name] for each in updates], axis=0) for name in current}
    current = {name: value + np.float32(mean[name]) for name, value in current.items()}
    load(current)
    print(f"round {round_number}: accuracy {accuracy():.3f}")
