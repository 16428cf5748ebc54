"""One script a claim: run each as ``python -m benchmarks.<name>``."""
