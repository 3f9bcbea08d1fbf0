"""Measurements of this code beside plain baselines; docs/benchmarks.md holds their results."""
