"""The page on which kept photographs get labels: their order, the folders of labels, the server."""
