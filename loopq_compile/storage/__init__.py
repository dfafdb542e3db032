"""Files: saved programs, manifests, and writing that leaves nothing half done."""
