"""What is generated from which condition."""
