"""The version, in one place that imports nothing. `pyproject.toml` says the same."""

VERSION = "0.1.0"
