"""What the example scripts and the studies share."""
