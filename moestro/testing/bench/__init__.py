"""Benchmarks behind `moestro bench NAME`: one module a benchmark, each with `run(repeats) -> list[Row]`."""
