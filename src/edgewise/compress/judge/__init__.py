"""A model held against another: `bundles.py` for language models, `nets.py` for other networks."""
