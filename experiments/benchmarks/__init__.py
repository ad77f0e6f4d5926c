"""What the efficiency benchmark is made of."""
