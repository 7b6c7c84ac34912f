"""One training step of a converted network: its points, the two structures of feedback, and what one step hands to the next."""
