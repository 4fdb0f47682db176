"""Geometries, contractions, per-token operators and the proof, each apart from the passes that use them."""
