"""A/B tests on live traffic: who gets which variant, what came of it, and what that says."""
