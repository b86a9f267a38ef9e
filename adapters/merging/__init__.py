"""Backbone merges: small pure functions over the deltas of one parameter."""
