"""The service on Ray Serve: Ray starts replicas, watches them and routes; we answer, batch and swap."""
