"""Data sets: manifests, decoding, geometry."""
