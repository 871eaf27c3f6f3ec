"""Common parts of the example scripts and the studies."""
