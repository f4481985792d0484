"""Methods of the serve stage."""
