"""Benchmarks, baselines and the demo: everything that measures, nothing that others embed."""
