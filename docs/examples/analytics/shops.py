"""What the shops have, what each says of it, and what follows from the sums."""

import numpy as np

NAMES = ("one", "age", "visits", "cents")
UPPER = np.triu_indices(len(NAMES))  # a Gram matrix is symmetric
DECADES = np.arange(10, 101, 10)
MOST = 1_000 * 20_000**2  # customers of a shop, times the square of the largest entry, in cents


def shop(number):
    """Age, visits a month and euros spent of a shop's customers."""
    rng = np.random.default_rng(number)
    size = rng.integers(50, 300)
    age = rng.integers(18, 90, size)
    visits = rng.poisson(1 + age / 20)
    spent = np.round(4.0 * visits + 0.2 * age + rng.normal(0, 3, size).clip(-9, 9), 2)
    return np.column_stack([age, visits, spent])


def answer(data):
    """What a shop contributes: integers by segment."""
    rows = np.column_stack([np.ones(len(data)), data[:, :2], 100 * data[:, 2]])
    rows = np.rint(rows).astype(np.int64)
    return {"gram": (rows.T @ rows)[UPPER], "ages": np.histogram(data[:, 0], DECADES)[0]}


def statistics(total):
    """Means, standard deviations, correlations, and the regression of euros on age and visits."""
    found = np.zeros((len(NAMES), len(NAMES)))
    found[UPPER] = total
    found = found + np.triu(found, 1).T
    mean = found[0] / found[0, 0]
    covariance = (found / found[0, 0] - np.outer(mean, mean))[1:, 1:]
    std = np.sqrt(np.diag(covariance))
    coefficients = np.linalg.solve(found[:3, :3], found[:3, 3]) / 100
    return mean[1:], std, covariance / np.outer(std, std), coefficients


def show(sums):
    """Print what follows from the sums of all shops, by segment."""
    mean, std, correlation, coefficients = statistics(sums["gram"])
    print("customers by decade:", *sums["ages"])
    print("mean age, visits, cents:", *mean.round(2), "+-", *std.round(2))
    print("age and visits correlate with", correlation[0, 1].round(3))
    print("euros = {:.2f} + {:.3f} age + {:.3f} visits".format(*coefficients))
