"""What two or more serving methods share."""
