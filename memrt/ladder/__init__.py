"""The parts of a ladder: its shape, its starting weights, its rungs, and how they meet a model."""
