"""Numbers read off a request and an edge answer; evidence.py gathers them, the other files read one kind each."""
