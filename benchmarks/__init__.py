"""Measurements of this code, compared with plain baselines; the results are in docs/benchmarks.md."""
