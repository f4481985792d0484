"""Methods of the train stage."""
