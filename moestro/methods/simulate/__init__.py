"""Methods of the simulate stage."""
