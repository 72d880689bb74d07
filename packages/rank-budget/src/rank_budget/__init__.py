"""A rank allocator: scores, schedules and exact pruning to a global rank budget."""
