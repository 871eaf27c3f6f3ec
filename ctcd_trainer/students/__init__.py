"""Make smaller models, and estimate their costs."""
