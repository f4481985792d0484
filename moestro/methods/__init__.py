"""One published idea a file; the path is the id."""
