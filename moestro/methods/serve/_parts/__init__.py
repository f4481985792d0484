"""What several serving methods share."""
