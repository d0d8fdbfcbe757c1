"""Benchmark suites, one file per op, installed as rewrite_core.benchmarks; README.md says how to run them."""
