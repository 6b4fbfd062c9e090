"""Keep photographs that are worth a label, and label them on a page."""
