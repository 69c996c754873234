"""What the benchmarks share: sizes, data, timing, floors, machine facts, tables."""
