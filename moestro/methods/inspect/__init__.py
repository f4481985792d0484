"""Methods of the inspect stage."""
