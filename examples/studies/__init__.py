"""Choices of the student on real data: quality, size, latency, time and memory; and rows without labels."""
