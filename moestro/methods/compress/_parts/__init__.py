"""What several compressions share."""
