"""What two or more simulations share."""
