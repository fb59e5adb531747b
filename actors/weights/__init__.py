"""Weight updates: packing, checks, and the plane that delivers and proves a version."""
