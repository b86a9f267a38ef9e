"""What an experiment's numbers mean: pure functions over sums by unit of assignment."""
