"""Loading, saving and addressing the parts of Hugging Face models."""
