"""Tests of the web pages, which share one Chromium."""
