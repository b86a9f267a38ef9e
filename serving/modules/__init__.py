"""Modules that come and go while the server runs."""
