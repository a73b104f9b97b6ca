"""Where models and inputs come from."""
