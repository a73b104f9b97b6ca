"""Other runtimes' formats, each with proof of what the file does."""
