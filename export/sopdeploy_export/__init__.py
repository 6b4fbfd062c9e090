"""From checkpoint to bundle: detach, prove, capture, lower, compare, write. One file per step."""
