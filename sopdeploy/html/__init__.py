"""Pages that need no network and no script: markup, amounts, charts and their style."""
