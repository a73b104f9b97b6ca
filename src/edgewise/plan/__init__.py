"""What fits a device and how fast it will be: arithmetic over a model's outline and a device's figures."""
