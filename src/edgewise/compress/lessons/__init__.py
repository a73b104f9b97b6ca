"""What a student learns from: texts, rows of them, and what the teacher says of each position."""
