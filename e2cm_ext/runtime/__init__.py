"""Runs stages and exits, and moves the samples that stay together."""
