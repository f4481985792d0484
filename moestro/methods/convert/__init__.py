"""Methods of the convert stage."""
