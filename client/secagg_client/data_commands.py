"""What `secagg-client data` prints: the rows of each file, and the interactions they make."""

from __future__ import annotations

from typing import Any

import numpy as np

from secagg.commands import out, print_table
from secagg_recommender.datasets import Dataset

__all__ = ["as_json", "show"]


def show(dataset: Dataset) -> None:
    """Tables for people."""
    if dataset.generated:
        out.print(f"generated: {dataset.generated}", highlight=False, soft_wrap=True)
    lines = [
        ("" if place else rows.what, *line)
        for rows in dataset.rows
        for place, line in enumerate(rows.lines())
    ]
    if lines:
        print_table(("file", "rows", "reason", "count"), lines)
    facts = _facts(dataset)
    facts["density"] = f"{facts['density']:.3%}"
    print_table(("interactions", "value"), [(name, value) for name, value in facts.items()])


def as_json(dataset: Dataset) -> dict[str, Any]:
    """One document for programs; ``generated`` is null where nothing was made up."""
    return {
        "name": dataset.interactions.name,
        "generated": dataset.generated,
        "files": [
            {
                "what": rows.what,
                "read": rows.read,
                "kept": rows.kept,
                "dropped": dict(rows.dropped),
                "noted": dict(rows.noted),
            }
            for rows in dataset.rows
        ],
        "interactions": _facts(dataset),
    }


def _facts(dataset: Dataset) -> dict[str, Any]:
    """Sizes of what was loaded."""
    made = dataset.interactions
    facts: dict[str, Any] = {
        "users": made.n_users,
        "items": made.n_items,
        "interactions": int(made.users.size),
        "density": made.users.size / (made.n_users * made.n_items),
        "order": made.tie_rule,
    }
    if dataset.attributes is not None:
        facts["item attributes"] = dataset.attributes.n_attributes
        facts["items without attributes"] = dataset.attributes.n_without
    if dataset.kinds is not None:
        counts = np.bincount(dataset.kinds, minlength=len(dataset.kind_names)).tolist()
        for name, count in zip(dataset.kind_names, counts, strict=True):
            facts[f"shoppers driven by {name}"] = count
    return facts
