"""What methods of the stage need besides what stands in their own files."""
