"""Time and memory of co-trainings."""
