"""Text, JSON lines and Parquet sources, packing, built-in corpora."""
