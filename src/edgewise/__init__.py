"""Edgewise: run a model on the device, ask the cloud when it pays, go on when the cloud is gone."""

__version__ = "0.1.0"
