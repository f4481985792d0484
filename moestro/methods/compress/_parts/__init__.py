"""What two or more methods of the stage share."""
