"""Example scripts, the studies of this project, and what they share."""
