"""Methods of the adapt stage."""
