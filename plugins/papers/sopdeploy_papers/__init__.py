"""What only the papers need: their tables, poolings that they compare with, and importers."""
