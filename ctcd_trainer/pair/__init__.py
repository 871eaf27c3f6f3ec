"""Several models as one module, and where they come from."""
