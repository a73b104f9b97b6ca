"""What an artifact's numbers say: parity, the gate, where it went wrong, what would fall back."""
