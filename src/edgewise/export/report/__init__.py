"""What was found, for programs and for readers."""
