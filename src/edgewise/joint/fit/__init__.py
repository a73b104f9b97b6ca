"""From a replay to a policy: `calibrate.py` is the door. Needs scikit-learn, which nothing needs at run time."""
