"""Methods of the compress stage."""
