"""Qualcomm's Hexagon."""
