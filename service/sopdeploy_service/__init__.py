"""From bundle to HTTP answer: verify, predict and serve. No torch in here."""
