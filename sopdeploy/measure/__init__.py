"""How good answers are, wherever they came from: one set of figures for all sources; no torch."""
