"""One file per target: how its artifact is made, and what it does when it is read back."""
