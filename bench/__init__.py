"""Benchmarks of e2cm_ext, and their results. `python -m bench` lists them."""
