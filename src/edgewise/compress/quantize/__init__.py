"""Fewer bits: `bundle.py` is the door for language models, `qdq.py` for other networks."""
