"""Training by time (`--minutes`): planner, throughput probe and clock."""
