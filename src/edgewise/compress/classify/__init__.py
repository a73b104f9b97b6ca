"""Classifiers that read text by themselves. Needs torch, to train them."""
