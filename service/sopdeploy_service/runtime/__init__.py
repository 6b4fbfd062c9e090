"""What can run a bundle: one module for each, siblings of one Protocol."""
