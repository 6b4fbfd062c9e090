"""Find the bottleneck of a running server from outside: bounded load, metrics, advice."""
