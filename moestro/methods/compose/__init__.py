"""Methods of the compose stage."""
