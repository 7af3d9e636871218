"""The small model's weights and the benchmarks, for installs of rfkernels from a wheel."""
