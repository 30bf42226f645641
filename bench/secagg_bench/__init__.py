"""Benchmarks, baselines and the demo: everything that measures, nothing that others embed."""

from secagg.extras import require

require("bench", "matplotlib", "shamir_mnemonic", "sqlalchemy", "torch", "typer")
