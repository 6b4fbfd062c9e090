"""Pictures with their classes: where they come from and how they become batches."""
