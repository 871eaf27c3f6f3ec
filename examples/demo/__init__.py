"""The data of `make demo`, and the comparison of finished runs."""
