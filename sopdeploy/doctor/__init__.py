"""What limits a running server, found from outside: bounded load, its metrics before and after, advice."""
