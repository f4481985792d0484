"""Public helpers for tests: tiny models, tolerances, contract checks."""
