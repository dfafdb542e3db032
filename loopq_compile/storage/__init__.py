"""Files: saved programs, manifests, and atomic writing."""
