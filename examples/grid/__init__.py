"""Runs many trainings, each once, and keeps their results."""
