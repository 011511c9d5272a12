"""The strategies that memrt ships: one technique, one file."""
