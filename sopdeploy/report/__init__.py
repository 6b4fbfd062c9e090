"""HTML reports on training runs (`sopdeploy report`)."""
