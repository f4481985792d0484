"""Methods of the place stage."""
