"""Measurements of the code side by side with plain textbook versions; docs/benchmarks.md holds their results."""
