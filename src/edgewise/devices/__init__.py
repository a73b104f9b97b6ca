"""What machines are: the catalogue of devices, and what this one measures."""
