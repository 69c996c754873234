"""Common parts of the benchmarks: sizes, data, timing, floors, machine facts, tables."""
